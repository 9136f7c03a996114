"""Materialise: rewrite the graph as one interval of a plan places it.

Before: every value whole on every rank, all-reduces of partial sums.
After: placed ops run on this rank's ``ceil(T/n)`` rows, reduce-scatters and all-gathers where the plan raises a
value, gathers that can run together fused into one, and whole values everywhere else; outputs are whole.
Refuses: nothing. A plan that does not fit the graph is an error before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cpcompile.errors import PlanError
from cpcompile.passes.collectives import fake_value, is_contiguous, op_name
from cpcompile.passes.op_call import UNUSED, RowWise
from cpcompile.passes.picked_rows import Picks, emit_picked
from cpcompile.passes.placement_problem import PlacementGraph, rows_source, takes_rows
from cpcompile.passes.shard_ops import ShardEmitter, in_row_major
from cpcompile.passes.token_layout import TokenDim, product, shape_of, size_expr
from cpcompile.plan import Interval

GATHERING = ("gather", "scatter+gather")


def materialise(gm: fx.GraphModule, graph: PlacementGraph, interval: Interval) -> fx.GraphModule:
    """Return a new graph module in which ``interval`` of a plan is carried out; ``gm`` is left as it is.

    ``meta["gathers"]`` of the result lists, per all-gather, the names of the values that it carries; ``meta["wholes"]``
    says of its nodes that are whole values which ones of ``gm`` they are, by their names.

    Raises:
        PlanError: the plan names a node that the graph lacks or that cannot be placed as it says.
    """
    _check_fits(graph, interval)
    return _Builder(gm, graph, interval).run()


def _check_fits(graph: PlacementGraph, interval: Interval) -> None:
    choices = {choice.node.name: choice for choice in graph.choices}
    for name, label in interval.labels.items():
        choice = choices.get(name)
        if choice is None or not {"P": choice.partial or choice.picks, "S": not choice.picks}.get(label, False):
            raise PlanError(f"the plan places {name!r} at {label!r}, which this graph does not allow: make a new plan")
    unknown = interval.raises.keys() - {node.name for node in graph.values}
    if unknown:
        raise PlanError(f"the plan raises {min(unknown)!r}, which this graph lacks: make a new plan")


class _Builder:
    """Builds the new graph; ``env`` holds every copy of every value: at P, S (per token dim) and R."""

    def __init__(self, gm: fx.GraphModule, graph: PlacementGraph, interval: Interval) -> None:
        assert graph.known.tokens is not None
        self.gm, self.graph, self.known, self.interval = gm, graph, graph.known, interval
        self.new = fx.Graph()
        self.emitter = ShardEmitter(self.new, self.known.axis, graph.known.tokens, fake_mode_of(gm), graph.hints)
        self.env: dict[tuple[fx.Node, str, TokenDim | None], fx.Node] = {}
        self.starts = {ar.start for wait, ar in self.known.all_reduces.items() if wait in graph.number}
        self.starts |= set(self.known.gathers.values())
        self.depth = self._depths()
        self.groups = self._gather_groups()
        self.gathered: list[list[str]] = []
        # Of the new graph: what was moved and so is row-major where it was not, and what has other strides for that.
        self.turned: set[fx.Node] = set()

    def run(self) -> fx.GraphModule:
        for node in self._order():
            self.emitter.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
            if node not in self.starts and not self._is_view(node):
                self._visit(node)
        self.new.eliminate_dead_code()
        self.new.lint()
        rewritten = fx.GraphModule(self.gm, self.new)
        rewritten.meta.update(self.gm.meta)
        rewritten.meta["gathers"] = self.gathered
        rewritten.meta["wholes"] = self._wholes()
        return rewritten

    def _wholes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for (node, level, _), made in self.env.items():
            if level == "R" and not takes_rows(self.graph, node):
                found.setdefault(made.name, node.name)
        return found

    def _is_view(self, node: fx.Node) -> bool:
        """Views are made when asked for, at the placement that is asked for; outputs of a tuple come with it."""
        origin = self.graph.origin.get(node)
        return origin is not None and origin is not node

    def label(self, node: fx.Node) -> str:
        """Placement at which ``node`` is computed."""
        value = self.graph.origin.get(node, node)
        number = self.graph.values[value][0] if value in self.graph.values else self.graph.number.get(value)
        if number is None:
            return "R"
        choice = self.graph.choices[number]
        return "P" if choice.reduced else "S" if choice.gathered else self.interval.labels.get(choice.node.name, "R")

    def demand(self, node: fx.Node, operand: fx.Node, label: str) -> tuple[str, TokenDim | None]:
        """Placement at which ``node``, made at ``label``, reads ``operand``, and where it expects the tokens."""
        if takes_rows(self.graph, node):
            return "S", self._layout(rows_source(self.graph, node))
        outcome = self.known.classes.get(node)
        if label == "P" and isinstance(outcome, Picks):
            return ("S", outcome.place) if operand is outcome.source else ("R", None)
        wanted = outcome.operands.get(operand) if isinstance(outcome, RowWise) else None
        if wanted is UNUSED:
            own = self.label(operand)
            return own, self._layout(operand) if own == "S" else None
        placed = node in self.graph.number or node in self.graph.origin
        if label == "S" and placed and isinstance(wanted, TokenDim):
            return "S", wanted
        if label == "P" and placed and (operand in self.graph.origin or operand in self.graph.number):
            return "P", None
        return "R", None

    def _depths(self) -> dict[fx.Node, int]:
        """How many gathers lie before each node, at most; constants as late as their first user."""
        depth: dict[fx.Node, int] = {}
        constant: list[fx.Node] = []
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                depth[node] = 0
                continue
            depth[node] = max((depth[n] + self._gathers(node, n) for n in node.all_input_nodes), default=0)
            if node.op == "call_function" and not self.known.layouts.get(node) and node in self.known.replicated:
                constant.append(node)
        for node in reversed(constant):
            depth[node] = max(depth[node], min((depth[user] for user in node.users), default=0))
        return depth

    def _gathers(self, node: fx.Node, operand: fx.Node) -> bool:
        value = self.graph.origin.get(operand)
        if value is None or self.interval.raises.get(value.name) not in GATHERING or self._is_view(node):
            return False
        return self.demand(node, operand, self.label(node))[0] == "R"

    def _order(self) -> Iterable[fx.Node]:
        """Nodes with what needs no further gather first, so that gathers meet; as they were if order has effects."""
        nodes = list(self.gm.graph.nodes)
        if any(n.op == "call_function" and _has_effects(n) for n in nodes):
            return nodes
        index = {n: i for i, n in enumerate(nodes)}
        last = 1 + max(self.depth.values(), default=0)
        return sorted(
            nodes,
            key=lambda n: (-1 if n.op == "placeholder" else last if n.op == "output" else self.depth[n], index[n]),
        )

    def _gather_groups(self) -> dict[fx.Node, list[fx.Node]]:
        """Values that are gathered together: same depth, same dtype, same leading dims."""
        keys: dict[tuple[Any, ...], list[fx.Node]] = {}
        for value in self.graph.values:
            if self.interval.raises.get(value.name) in GATHERING:
                layout, shape = self._layout(value), self.known.shapes[value][0]
                pre = product(shape[: layout.dim]) * layout.outer
                keys.setdefault((self.depth[value], value.meta["val"].dtype, pre), []).append(value)
        return {value: group for group in keys.values() for value in group}

    def _layout(self, value: fx.Node) -> TokenDim:
        layout = self.known.layouts[value][0]
        assert layout is not None
        return layout

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            copy = self.new.node_copy(node)
            copy.meta = dict(node.meta)
            self.env[node, "R", None] = copy
            if node.op == "placeholder":
                self.emitter.bind(copy)
            return
        if node in self.known.all_reduces and node in self.graph.number:
            self._hold(node, "P", None, self._partial_input(node))
            return
        if node in self.known.gathers:
            self._hold(node, "S", self._layout(node), self._gathered_rows(self.known.gathered(node)))
            return
        if takes_rows(self.graph, node):
            source = rows_source(self.graph, node)
            self._hold(node, "R", None, self.get(source, "S", self._layout(source)))
            return
        if op_name(node.target) in ("aten::sym_size", "aten::sym_numel") and self._size_of_shard(node):
            return
        label = self.label(node)
        layout = self._layout(node) if label == "S" else None
        self.env[node, label, layout] = self._emit(node, label)

    def _size_of_shard(self, node: fx.Node) -> bool:
        """A size is the whole value's, whatever copy is at hand: compute it from the inputs' sizes instead."""
        source = node.all_input_nodes[0]
        value = node.meta.get("val")
        split = self.label(source) == "S" or source in self.starts
        if not split or not isinstance(value, torch.SymInt):
            return False
        size = self.emitter.size(value.node.expr)
        assert isinstance(size, fx.Node)
        self.env[node, "R", None] = size
        return True

    def _gathered_rows(self, source: fx.Node) -> fx.Node:
        """What an all-gather of the graph gathers, as the shard that it is."""
        rows, value = self.get(source, "R", None), source.meta["val"]
        return rows if in_row_major(rows, value) else self.emitter.contiguous(rows, value, self.known.shapes[source][0])

    def _partial_input(self, wait: fx.Node) -> fx.Node:
        source = self.known.all_reduces[wait].input
        raw = self.get(source, "R", None)
        value = source.meta["val"]
        row_major = self.emitter.fake(self.known.shapes[source][0], value)
        if row_major is not None and row_major.stride() != raw.meta["val"].stride():
            raw = self.emitter.contiguous(raw, value, self.known.shapes[source][0])
        return raw

    def _emit(self, node: fx.Node, label: str) -> fx.Node:
        """Copy ``node``, reading its operands where ``label`` demands them and sizing it for its rows."""
        operands = {n: self.get(n, *self.demand(node, n, label)) for n in node.all_input_nodes}
        outcome = self.known.classes.get(node)
        if label == "P" and isinstance(outcome, Picks):
            index = None if outcome.index is None else operands[outcome.index]
            return emit_picked(self.emitter, node, outcome, operands[outcome.source], index)
        if label != "R" and isinstance(outcome, RowWise) and outcome.identity:
            return operands[node.all_input_nodes[0]]
        if label != "S":
            copy = self.new.node_copy(node, lambda n: operands[n])
            copy.meta = dict(node.meta)
            return self._restrided(copy)
        assert isinstance(outcome, RowWise)
        layout = self._layout(node)
        local = self.emitter.size(layout.size(self.emitter.local))
        copy = self.new.node_copy(node, lambda n: operands[n])
        copy.meta = {**node.meta, "val": self._local_val(node)}
        if outcome.size_arg is not None:
            sizes = list(copy.args[outcome.size_arg])  # type: ignore[arg-type]
            sizes[layout.dim] = local
            copy.update_arg(outcome.size_arg, sizes)
        return self._restrided(copy)

    def _restrided(self, copy: fx.Node) -> fx.Node:
        """What was moved is row-major and may not allow a view that its other strides did, nor what is made of it."""
        if self.turned.isdisjoint(copy.all_input_nodes):
            return copy
        self.turned.add(copy)
        if copy.target is torch.ops.aten.view.default:
            copy.target = torch.ops.aten.reshape.default
        value = copy.meta.get("val")
        if _has_effects(copy) or value is None or any("val" not in n.meta for n in copy.all_input_nodes):
            return copy
        found = fake_value(copy, copy)
        if isinstance(value, torch.Tensor):
            copy.meta["val"] = self._with_strides(value, found)
        elif isinstance(value, (list, tuple)):
            copy.meta["val"] = type(value)(map(self._with_strides, value, found))
        return copy

    def _with_strides(self, value: Any, found: Any) -> Any:
        """A fake tensor of the shape of ``value`` and the strides of ``found``; what is no tensor as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        return self.emitter.fake(shape_of(value), value, [size_expr(stride) for stride in found.stride()])

    def _local_val(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        layouts = self.known.layouts[node]
        if isinstance(value, torch.Tensor):
            assert layouts[0] is not None
            return self.emitter.local_fake(value, layouts[0])
        return type(value)(
            self.emitter.local_fake(v, layout) if layout is not None else v
            for v, layout in zip(value, layouts, strict=True)
        )

    def get(self, node: fx.Node, level: str, layout: TokenDim | None) -> fx.Node:
        """The copy of ``node`` at ``level``, made if need be."""
        key = (node, level, layout)
        if key in self.env:
            return self.env[key]
        if self._is_view(node):
            self.env[key] = self._emit(node, level)
        else:
            self._hold(node, level, layout, self._raise(node, level, layout))
        return self.env[key]

    def _hold(self, node: fx.Node, level: str, layout: TokenDim | None, made: fx.Node) -> None:
        """``made`` stands for ``node`` at ``level`` and is no copy of it."""
        self.env[node, level, layout] = made
        # Own rows may be one of several results: of those that node is not asked.
        if not all(is_contiguous(n) for n in (node, made) if isinstance(n.meta.get("val"), torch.Tensor)):
            self.turned.add(made)

    def _raise(self, node: fx.Node, level: str, layout: TokenDim | None) -> fx.Node:
        own = self.label(node)
        assert own != level, f"{node} is read at {level} before it is made"
        value, shape = node.meta["val"], self.known.shapes[node][0]
        route = self.interval.raises.get(node.name, "")
        if level == "S":
            assert layout is not None
            if own == "P" and route != "reduce":
                return self.emitter.scatter(self.get(node, "P", None), value, shape, layout)
            return self.emitter.own_rows(self.get(node, "R", None), value, shape, layout)
        assert level == "R", f"{node} is wanted at {level} and made at {own}"
        if own == "P" and route == "reduce":
            return self.emitter.all_reduce(self.get(node, "P", None), value, shape)
        assert route in GATHERING, f"{node} is wanted whole and made at {own}, and the plan has no collective for it"
        return self._gather(node)

    def _gather(self, node: fx.Node) -> fx.Node:
        """Gather ``node`` and with it whatever of its group is there."""
        ready = [v for v in self.groups[node] if v is node or self._is_there(v)]
        parts = [
            (self.get(v, "S", self._layout(v)), v.meta["val"], self.known.shapes[v][0], self._layout(v)) for v in ready
        ]
        self.gathered.append([v.name for v in ready])
        for v, whole in zip(ready, self.emitter.gather(parts), strict=True):
            self._hold(v, "R", None, whole)
        return self.env[node, "R", None]

    def _is_there(self, value: fx.Node) -> bool:
        layout = None if self.label(value) == "P" else self._layout(value)
        return (value, self.label(value), layout) in self.env and (value, "R", None) not in self.env


def _has_effects(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode of the graph's ``meta["val"]`` tensors, None if there are none."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None
