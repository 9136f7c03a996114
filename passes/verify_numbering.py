"""Value numbering of the original graph, for the static proof: equal numbers, equal values, whatever their shape.

Before: a functional ATen graph. After: every tensor is a content and the digits into it (``verify_index``), every
call is found by its op, its operands' numbers and its other arguments, and it is known which contents are the same on
all ranks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._ops import OpOverload

from cpcompile.axes import Axis
from cpcompile.declared_ops import stated
from cpcompile.passes.collectives import group_name_of, is_wait
from cpcompile.passes.verify_arguments import (
    LAST,
    RESHAPES,
    Arguments,
    Refused,
    View,
    aliases,
    communicates,
    is_mutable,
    is_random,
    op_name,
    reshaped,
)
from cpcompile.passes.verify_groups import Holdings
from cpcompile.passes.verify_index import Dims, Shape, Size, row_major, shape, tensor_shape, times

PURE_NAMESPACES = frozenset({"aten", "prims", "transformers", "cpcompile", "vllm_ir"})
# Of torch_npu's ops, of which some communicate or draw random numbers, these do neither.
PURE_NPU = frozenset({"rms_norm", "add_rms_norm", "interleave_rope", "rotary_mul", "scatter_nd_update"})
PURE_NPU |= {"lightning_indexer", "sparse_flash_attention", "kv_rmsnorm_rope_cache", "mla_prolog", "mla_prolog_v2"}
PURE_NPU |= {"fused_infer_attention_score", "fused_infer_attention_score_v2", "scatter_pa_kv_cache_functional"}
PURE_NPU |= {"kv_rmsnorm_rope_cache_v2_functional", "mla_prolog_v3_functional"}
PURE_NPU = frozenset(f"npu_{name}" for name in PURE_NPU)


class Numbering(Arguments):
    """The original graph, numbered.

    Args:
        holdings: what its collectives' ranks hold.
        env: what every tensor-valued node is, one view per result.
        calls: results of every call, by its key.
        replicated: per content, whether it is the same on every rank of the axis.
        sums: content that this axis all-reduces → content of the sum.
        names: the node that first had a content with these digits.
        volatile: contents of graph inputs that are written in place.
        varying: symbols of sizes and numbers that differ between the ranks.
        gathers: what this axis all-gathers along dim 0 → the result.
        parts: content → its dims, dim, first and last row, and the value that is these rows of it.
    """

    def __init__(self, gm: fx.GraphModule, axis: Axis) -> None:
        """Nothing is numbered yet: ``of`` does that."""
        super().__init__(gm, axis)
        self.gm = gm
        self.holdings = Holdings(axis)
        self.env: dict[fx.Node, tuple[View, ...]] = {}
        self.calls: dict[object, tuple[View, ...]] = {}
        self.numbers: dict[object, Any] = {}
        self.replicated: list[bool] = []
        self.sums: dict[int, int] = {}
        self.names: dict[tuple[int, Dims | None], str] = {}
        self.volatile: set[int] = set()
        self.gathers: dict[View, View] = {}
        self.parts: dict[int, list[tuple[Dims, int, Size, Size, View]]] = {}
        self.varying: set[sympy.Basic] = set()
        self._symbols: set[sympy.Basic] = set()
        self._makers: dict[int, str] = {}
        self._fact: Callable[[str], bool] = lambda _: False
        self._differing: Collection[str] = ()

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        axis: Axis,
        replicated: Callable[[str], bool],
        rank_dependent: Collection[str],
        varying: Collection[sympy.Basic] = (),
    ) -> Numbering:
        """Number ``gm``; arguments as for ``prove``."""
        differing = set(rank_dependent)
        while True:
            found = cls(gm, axis)
            found._fact, found._differing, found.varying = replicated, differing, set(varying)
            more = found._number()
            if not more:
                return found
            differing = differing | more

    def _number(self) -> set[str]:
        """Number all nodes; returns those that made what a node that differs between ranks is numbered as, too."""
        more: set[str] = set()
        for node in self.gm.graph.find_nodes(op="placeholder"):
            symbols = _symbols_in(node.meta.get("val"))
            self._symbols |= symbols
            if not isinstance(node.meta.get("val"), torch.Tensor) and symbols and not self._fact(node.name):
                self.varying |= symbols
        for node in self.gm.graph.nodes:
            if node.op != "output" and not self.visit_size(node, lambda n: shape(self.env[n][0][1])):
                self.env[node] = views = self._visit(node)
                if node.name in self._differing:
                    more |= {self._makers[content] for content, _ in views if self.replicated[content]}
                if len(views) == 1 and (is_wait(node) or not communicates(node)):
                    self.names.setdefault(views[0], node.name)
                    self.names.setdefault((views[0][0], None), node.name)
        return more

    @property
    def output(self) -> fx.Node:
        """The ``output`` node."""
        return self.gm.graph.output_node()

    def name(self, view: tuple[int, Dims | None]) -> str:
        """An original node that is ``view``, or is of the same content."""
        return self.names.get(view) or self.names.get((view[0], None)) or "an unread result"

    def source(self, node: fx.Node, gm: fx.GraphModule) -> tuple[View, ...]:
        """What a graph input or constant of the rewritten graph ``gm`` is."""
        for mine in self.gm.graph.find_nodes(op=node.op, target=node.target):
            if node.op == "placeholder" or _same_constant(self.gm, gm, str(node.target)):
                return self.env[mine]
        raise Refused(f"expected {node.op} {node.target!r} to be in the original graph; it is not, or differs")

    def missing(self, arguments: Arguments, gm: fx.GraphModule) -> list[tuple[str, str]]:
        """Inputs that differ, calls with effects that are gone, and writes that cannot be followed."""
        found = []
        mine, theirs = ([n.target for n in g.graph.find_nodes(op="placeholder")] for g in (self.gm, gm))
        if mine != theirs:
            found.append(("placeholder", f"expected the graph inputs {mine}; found {theirs}"))
        for node in list(self.effects)[len(arguments.effects) :]:
            found.append((node.name, f"{node.name}: expected this call with effects; it is gone"))
        for root in {n for n in [*self.mutated, *arguments.mutated] if n.op != "placeholder"}:
            found.append((root.name, f"{root.name}: expected a functional graph; it is written in place"))
        return found

    def _content(self, sizes: Shape) -> View:
        self.replicated.append(False)
        return len(self.replicated) - 1, row_major(sizes)

    def _new(self, node: fx.Node, operands: list[int]) -> tuple[View, ...]:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else [value]
        if value is None and isinstance(node.target, OpOverload) and not node.target._schema.returns:
            values = []
        shapes = [tensor_shape(v) if isinstance(v, torch.Tensor) else () for v in values]
        views = tuple(self._content(sizes) for sizes in shapes)
        made = _symbols_in(value)
        counts = made.union(*(_symbols_in(argument) for argument in self.arguments(node).values()))
        shared = node.name not in self._differing and self._is_replicated(node, operands) and not counts & self.varying
        if not shared:
            self.varying |= made - self._symbols  # a size that values which differ have brought up
        self._symbols |= made
        for content, _ in views:
            self.replicated[content], self._makers[content] = shared, node.name
        if node in self.mutated or (aliases(node) and self.volatile & set(operands)):
            self.volatile |= {content for content, _ in views}
        return views

    def _visit(self, node: fx.Node) -> tuple[View, ...]:
        if node.op in ("placeholder", "get_attr"):
            return self._new(node, [])
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if is_wait(node) and source is not None:
            return self.env[source]
        if node.target is operator.getitem and source is not None:
            return (self.env[source][node.args[1]],)  # type: ignore[index]
        at = {n: self.env[n][0] for n in node.all_input_nodes if self.env.get(n) and n not in self.sizes}
        if source in at and node.args[0] is source:
            view = self._followed(node, at[source])
            if view is not None:
                return (view,)
        key = self.key(node, at, self.volatile)
        if key not in self.calls:
            operands = [] if self.reads_no_data(node) else [content for content, _ in at.values()]
            self.calls[key] = self._new(node, operands)
            if source in at and node.args[0] is source:
                self._note_rows(node, at[source], self.calls[key])
            if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
                self.numbers[key] = node.meta["val"].node.expr
        if key in self.numbers:
            self.sizes[node] = self.numbers[key]
        return self.calls[key]

    def _note_rows(self, node: fx.Node, source: View, results: tuple[View, ...]) -> None:
        """Note gathers over the axis, and what are some rows of a value."""
        name, args = op_name(node.target), self.arguments(node)
        content, dims = source
        if content in self.volatile:
            return
        if name == "_c10d_functional::all_gather_into_tensor" and self.holdings.same_order(group_name_of(node)):
            if args["group_size"] == self.axis.size:
                self.gathers[source] = results[0]
        elif name == "aten::slice" and args["step"] == 1:
            dim, end = args["dim"] % len(dims), args["end"]
            last = shape(dims)[dim] if end is None or end == LAST else end
            self.parts.setdefault(content, []).append((dims, dim, args["start"] or 0, last, results[0]))
        elif name == "aten::split" and self.axis.rank < len(results):
            size, dim = args["split_size"], args["dim"] % len(dims)
            first = times(size, self.axis.rank)
            part = (dims, dim, first, first + size, results[self.axis.rank])
            self.parts.setdefault(content, []).append(part)

    def _followed(self, node: fx.Node, view: View) -> View | None:
        """``view`` after an op that leaves its content as it is, or that sums it over the axis."""
        content, dims = view
        if op_name(node.target) == "_c10d_functional::all_reduce":
            if content in self.volatile:
                return None
            if self.leaves_copies(node, content):
                return view
            if self.arguments(node)["reduce_op"] != "sum" or not self.holdings.same_ranks(group_name_of(node)):
                return None
            if content not in self.sums:
                self.sums[content] = len(self.replicated)
                self._makers[self.sums[content]] = node.name
                self.replicated.append(node.name not in self._differing)
            return self.sums[content], dims
        if op_name(node.target) not in RESHAPES or (content in self.volatile and not aliases(node)):
            return None
        moved = reshaped(node, self.arguments(node), dims)
        return None if moved is None else (content, moved)

    def leaves_copies(self, node: fx.Node, content: int) -> bool:
        """Whether the all-reduce ``node`` meets equal copies of ``content`` on all its ranks and gives just that."""
        copies = self.replicated[content] and self.arguments(node)["reduce_op"] in ("max", "min", "avg")
        return copies and self.holdings.reduces_copies(group_name_of(node))

    def _is_replicated(self, node: fx.Node, operands: list[int]) -> bool:
        if node.op == "placeholder":
            return not isinstance(node.meta.get("val"), torch.Tensor) or self._fact(node.name)
        if node.op == "get_attr":
            return True
        if not isinstance(node.target, OpOverload) or is_random(node) or is_mutable(node):
            return False
        shared = all(self.replicated[content] for content in operands)
        namespace, name = op_name(node.target).split("::")
        if namespace == "_c10d_functional":
            if name not in ("all_gather_into_tensor", "broadcast", "all_reduce"):
                return False
            group = group_name_of(node)
            alike = name == "all_reduce" and shared and self.holdings.reduces_alike(group)
            return alike or self.holdings.gathers_all(group)
        pure = namespace in PURE_NAMESPACES or name in PURE_NPU or stated(f"{namespace}::{name}") is not None
        return pure and shared


def _symbols_in(value: Any) -> set[sympy.Basic]:
    """Symbols in the sizes of tensors and in numbers."""
    if isinstance(value, list | tuple):
        return set[sympy.Basic]().union(*map(_symbols_in, value))
    if isinstance(value, torch.Tensor):
        return set[sympy.Basic]().union(*(getattr(size, "free_symbols", ()) for size in tensor_shape(value)))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return set(value.node.expr.free_symbols)
    return set(value.free_symbols) if isinstance(value, sympy.Basic) else set()


def _same_constant(mine: fx.GraphModule, theirs: fx.GraphModule, target: str) -> bool:
    a, b = operator.attrgetter(target)(mine), operator.attrgetter(target)(theirs)
    if a is b:
        return True
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
