"""Module tensor parallelism: a group of ranks shares the weight of a module that each of them held whole.

Before: every rank multiplies its own rows by the whole weight of its embedding, o_proj, MLP or lm_head.
After (P ranks, N rows each): *embedding* all-gather of ids, lookup among this rank's rows of the table, reduce-scatter;
*o_proj* all-to-all to all rows of some columns, product, reduce-scatter; *mlp* all-gather, both products on this rank's
inner columns, reduce-scatter; *lm_head* all-gather, product with this rank's vocabulary, all-to-all. A bias is added
once. Where the ranks may have different numbers of rows they agree on N first, once in a step (``group_tokens``).
Source: vllm-ascend, fine-grained tensor parallelism.
Refuses: what ``module_cuts`` cannot cut.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.graph_emitter import GraphEmitter
from cpcompile.passes.materialise import fake_mode_of
from cpcompile.passes.module_columns import InnerColumns
from cpcompile.passes.module_cuts import SharedModule, cuts_of
from cpcompile.passes.module_inner import InnerValues, masked_lookup, reshaped_from
from cpcompile.passes.products import PRODUCTS, Product, product_of
from cpcompile.passes.row_groups import EXCHANGE, RowCounts, RowGroup
from cpcompile.passes.shard_ops import is_row_major
from cpcompile.passes.token_layout import Expr, Shape, product, shape_of, size_expr
from cpcompile.passes.weight_cuts import Cut, CutRefused

aten = torch.ops.aten


def made_for(graph: SharedGraph, name: str) -> list[SharedModule]:
    """The modules that node ``name`` was made for; of another node, the nearest ones before it."""
    nodes = {node.name: node for node in graph.gm.graph.nodes}
    pending, seen, found = [nodes[name]] if name in nodes else [], set[fx.Node](), dict[SharedModule, None]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in graph.made_for:
            found[graph.made_for[node.name]] = None
        else:
            pending += node.all_input_nodes
    return list(found)


@dataclass(frozen=True)
class SharedGraph:
    """A graph whose modules are shared.

    Args:
        gm: the graph; its weights are this rank's parts.
        cuts: graph input → how it is cut.
        axes: graph input → the ranks that share it.
        most_rows: numbers of rows that must not be more than ``group_tokens``, where that is a number.
        made_for: node of the graph → the module that it was made for, or whose weight it is.
    """

    gm: fx.GraphModule
    cuts: Mapping[str, Cut]
    axes: Mapping[str, Axis]
    most_rows: tuple[Expr, ...] = ()
    made_for: Mapping[str, SharedModule] = field(default_factory=dict)


class ModulesRefused(Exception):
    """Some modules cannot be shared in a graph; the message is the reason, in one line."""

    def __init__(self, modules: Sequence[SharedModule], error: Exception) -> None:
        """``error``: what was raised."""
        told = str(error) if isinstance(error, CutRefused) else f"{type(error).__name__}: {error}"
        super().__init__(told.partition("\n")[0])
        self.modules = tuple(modules)


def share_modules(
    gm: fx.GraphModule,
    modules: Sequence[SharedModule],
    group_tokens: str | int = EXCHANGE,
    same: Collection[str] = (),
    hints: Mapping[sympy.Symbol, int] | None = None,
) -> SharedGraph:
    """Return a new graph in which each of ``modules`` is tensor-parallel over its axis; ``gm`` is left as it is.

    Args:
        gm: functional ATen graph.
        modules: what to share; each can be (see ``cuts_of``).
        group_tokens: how ranks that may have different numbers of rows agree on N: ``"exchange"`` the largest at each
            step, ``"equal"`` says that all have as many, a number is N.
        same: nodes that are known to be the same on all ranks of the modules' groups.
        hints: sizes of the traced example.

    Raises:
        ModulesRefused: one of them cannot be, or a static graph has more rows than ``group_tokens``.
    """
    return _Builder(gm, modules, group_tokens, same, hints or {}).run()


def idle_graph(
    gm: fx.GraphModule,
    modules: Sequence[SharedModule],
    group_tokens: str | int = EXCHANGE,
    hints: Mapping[sympy.Symbol, int] | None = None,
) -> fx.GraphModule:
    """What a rank without tokens runs while the others of its groups run :func:`share_modules`' graph.

    It takes part in every collective of the modules whose ranks may have different numbers of rows, with zeros, and
    multiplies the others' rows by its part of the weights. Its inputs are these parts, by the names that they have in
    ``gm``; what it returns has no meaning.

    Raises:
        ModulesRefused: as :func:`share_modules`.
    """
    unequal = [module for module in modules if module.unequal]
    return _Builder(gm, unequal, group_tokens, (), hints or {}, idle=True).run_idle()


class _Builder:
    """Builds the new graph; ``env`` holds the copy of every node, of this rank's own rows where it has rows."""

    def __init__(
        self,
        gm: fx.GraphModule,
        modules: Sequence[SharedModule],
        group_tokens: str | int,
        same: Collection[str],
        hints: Mapping[sympy.Symbol, int],
        idle: bool = False,
    ) -> None:
        self.gm, self.same, self.idle = gm, same, idle
        self.new = fx.Graph()
        self.emitter = GraphEmitter(self.new, fake_mode_of(gm), hints)
        self.env: dict[fx.Node, fx.Node] = {}
        self.gathered: dict[tuple[fx.Node, str], fx.Node] = {}
        self.cuts: dict[fx.Node, Cut] = {}
        self.axes: dict[str, Axis] = {}
        self.module_of: dict[fx.Node, SharedModule] = {}
        self.mine: dict[SharedModule, tuple[fx.Node, ...]] = {}
        self.columns: dict[SharedModule, InnerColumns] = {}
        self.inner: dict[SharedModule, InnerValues] = {}
        self.made_for: dict[str, SharedModule] = {}
        for module in modules:
            with self._telling(module):
                self._read(module)
        wanted = [(m.role, m.axis, _rows_of(node)) for m, mine in self.mine.items() for node in mine if m.unequal]
        try:
            self.rows = RowCounts(self.emitter, group_tokens, wanted, idle)
        except CutRefused as refused:
            raise ModulesRefused([m for m in modules if m.unequal], refused) from refused

    def _read(self, module: SharedModule) -> None:
        found = cuts_of(self.gm, module)
        self.cuts.update(found.nodes)
        self.axes.update(dict.fromkeys(found.inputs(), module.axis))
        self.made_for.update(dict.fromkeys(found.inputs(), module))
        self.mine[module], self.columns[module] = found.mine, found.inner
        self.module_of.update(dict.fromkeys((*found.mine, *found.inner.middle), module))

    @contextlib.contextmanager
    def _telling(self, module: SharedModule) -> Iterator[None]:
        """Note what is made for ``module``; raise :class:`ModulesRefused` where it cannot be."""
        before = len(self.new.nodes)
        try:
            yield
        except Exception as error:
            raise ModulesRefused([module], error) from error
        made = itertools.islice(reversed(self.new.nodes), len(self.new.nodes) - before)
        self.made_for.update({node.name: module for node in made})

    def run(self) -> SharedGraph:
        for node in self.gm.graph.nodes:
            self.emitter.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
            if not self._shared(node):
                self._copy(node)
        self.new.eliminate_dead_code()
        self.new.lint()
        shared = fx.GraphModule(self.gm, self.new)
        shared.meta.update(self.gm.meta)
        inputs = {node.name: cut for node, cut in self.cuts.items() if node.op == "placeholder"}
        return SharedGraph(shared, inputs, self.axes, self.rows.limited, self.made_for)

    def run_idle(self) -> fx.GraphModule:
        results = []
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" or node in self.cuts:
                self._copy(node)
            elif self._shared(node) and node in self.env:
                results.append(self.env[node])
        self.new.output(tuple(results))
        for node in self.new.find_nodes(op="placeholder"):
            if not node.users:
                self.new.erase_node(node)
        self.new.lint()
        return fx.GraphModule(self.gm, self.new)

    def _shared(self, node: fx.Node) -> bool:
        """Build ``node`` of a module that is shared; whether it is of one."""
        module = self.module_of.get(node)
        if module is not None:
            with self._telling(module):
                if node in self.mine[module]:
                    self._module(node, module)
                else:
                    self.inner[module].copy(node, self.new)
        return module is not None

    def _copy(self, node: fx.Node) -> None:
        copy = self.new.node_copy(node, self._value)
        copy.meta = dict(node.meta)
        cut, value = self.cuts.get(node), node.meta.get("val")
        if cut is not None and isinstance(value, torch.Tensor):
            copy.meta["val"] = self.emitter.fake(_part(shape_of(value), cut), value)
        if node.op == "placeholder":
            self.emitter.bind(copy)
        self.env[node] = copy

    def _value(self, node: fx.Node) -> fx.Node:
        """The copy of ``node``; of an idle rank, made when it is asked for."""
        if self.idle and node not in self.env:
            self._copy(node)
        return self.env[node]

    def _group(self, module: SharedModule, own: Collection[fx.Node], rows: Expr) -> RowGroup:
        same = not module.unequal and all(node.name in self.same for node in own)
        padded = self.rows.padded(module.role, rows) if module.unequal else rows
        return RowGroup(self.emitter, module.axis, rows, padded, same, self.idle)

    def _module(self, node: fx.Node, module: SharedModule) -> None:
        if module.role == "embedding":
            self.env[node] = self._embedding(node, module)
            return
        p = product_of(node)
        assert p is not None
        read = [q.rows for n in self.mine[module][: -1 if module.role == "mlp" else None] if (q := product_of(n))]
        group = self._group(module, read, _rows_of(node))
        if module.role == "lm_head":
            width = size_expr(node.meta["val"].shape[1])
            self.env[node] = group.own_rows(self._on_columns(p, group), node.meta["val"], width)
        elif module.role == "o_proj":
            value = p.rows.meta["val"]
            rows = group.columns(self.env.get(p.rows), value, size_expr(value.shape[1]))
            self.env[node] = self._summed(p, rows, group)
        elif node.name == module.nodes[-1]:
            inner = self.inner[module]
            self.env[node] = self._summed(p, inner.env[p.rows], inner.group)
        else:
            inner = self.inner.setdefault(module, InnerValues(self.columns[module], group))
            inner.env[node] = self._on_columns(p, inner.group)

    def _on_columns(self, p: Product, group: RowGroup) -> fx.Node:
        """The product of all ranks' rows with this rank's columns of the weight."""
        width = size_expr(p.node.meta["val"].shape[1]) / group.axis.size
        bias = None if p.bias is None else self.env[p.bias]  # cut, as its weight is
        return self._product(p, self._gathered(p.rows, group), group, width, bias)

    def _summed(self, p: Product, rows: fx.Node, group: RowGroup) -> fx.Node:
        """Own rows of the product of all ranks' rows with this rank's rows of the weight, summed over the ranks."""
        like, width = p.node.meta["val"], size_expr(p.node.meta["val"].shape[1])
        summed = group.sum(self._product(p, rows, group, width, bias=None), like, width)
        if p.bias is None or self.idle:
            return summed
        return self.emitter.call(aten.add.Tensor, (summed, self.env[p.bias]), like, (group.rows, width))

    def _product(self, p: Product, rows: fx.Node, group: RowGroup, width: Expr, bias: fx.Node | None) -> fx.Node:
        target, like, shape = p.node.target, p.node.meta["val"], (group.every, width)
        if op_name(target) == "aten::addmm" and bias is None:
            return self.emitter.call(aten.mm.default, (rows, self._value(p.weight)), like, shape)
        assert isinstance(target, torch._ops.OpOverload)
        form, given = PRODUCTS[op_name(target)], arguments(p.node)
        new: dict[str, Any] = {
            form.rows: rows,
            **{n: self._gathered(given[n], group) for n in form.per_row if given[n] in p.per_row},
        }
        new |= {form.bias: bias} if form.bias else {}
        new = {k: new[k] if k in new else self._value(v) if isinstance(v, fx.Node) else v for k, v in given.items()}
        named = {a.name for a in target._schema.arguments if a.kwarg_only}
        positional = tuple(v for k, v in new.items() if k not in named)
        return self.emitter.call(target, positional, like, shape, None, **{k: new[k] for k in new if k in named})

    def _gathered(self, own: fx.Node, group: RowGroup) -> fx.Node:
        """All ranks' rows of what this rank has rows of; gate and up read the same ones."""
        key = (reshaped_from(own), group.axis.group_name)
        if key not in self.gathered:
            value = own.meta["val"]
            self.gathered[key] = group.gather(self.env.get(own), value, shape_of(value)[1:])
        return self.gathered[key]

    def _embedding(self, node: fx.Node, module: SharedModule) -> fx.Node:
        table, ids = node.args[0], node.args[1]
        assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
        value, like = ids.meta["val"], node.meta["val"]
        rows, width = _rows_of(node), shape_of(like)[-1]
        group = self._group(module, [ids], rows)
        every = group.gather(self._flat(ids), value, ())
        found = masked_lookup(node, self.env[table], every, group)
        summed = group.sum(found, like, width)
        return summed if self.idle else self.emitter.reshape(summed, like, (rows, width), shape_of(like))

    def _flat(self, ids: fx.Node) -> fx.Node | None:
        if self.idle:
            return None
        value, own = ids.meta["val"], self.env[ids]
        if not is_row_major(value):
            own = self.emitter.contiguous(own, value, shape_of(value))
        return self.emitter.reshape(own, value, shape_of(value), (product(shape_of(value)),))


def _rows_of(node: fx.Node) -> Expr:
    """Rows of a product or lookup."""
    return product(shape_of(node.meta["val"])[:-1])


def _part(shape: Shape, cut: Cut) -> Shape:
    return tuple(size / cut.parts if dim == cut.dim else size for dim, size in enumerate(shape))
