"""The static proof: that a rewritten graph computes, on every rank, what the original graph computes.

Translation validation by value numbering: every value of the rewritten graph is shown to be some value of the
original one, whole, as this rank's rows, or as a summand, with reshapes, padding and gathers followed by index
arithmetic (``verify_index``) and row-wise ops by a table (``verify_rules``). Shares no code with the planner.
What a collective does to rows, summands and copies is told from the ranks that meet in it (``verify_groups``).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeAlias

import sympy
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.declared_ops import stated
from cpcompile.passes.collectives import group_name_of, is_wait
from cpcompile.passes.verify_arguments import REPEATING, Arguments, Refused, View, communicates, op_name
from cpcompile.passes.verify_call import Call, pointwise
from cpcompile.passes.verify_index import (
    Rows,
    Shape,
    Split,
    divide,
    product,
    row_major,
    same,
    shape,
    times,
)
from cpcompile.passes.verify_moves import Mover, Value, whole
from cpcompile.passes.verify_numbering import Numbering
from cpcompile.passes.verify_picks import Picks
from cpcompile.passes.verify_proof import Failure, Proof, check_outputs, check_shapes, told_op
from cpcompile.passes.verify_rules import is_linear, results_by_rows, rows_of

MOST_READINGS = 64


Readings: TypeAlias = tuple[Value, ...]


def prove(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    axis: Axis,
    tokens: sympy.Expr,
    replicated: Callable[[str], bool],
    rank_dependent: Collection[str] = (),
    varying: Collection[sympy.Basic] = (),
) -> Proof:
    """Prove that ``rewritten`` computes what ``original`` computes.

    Args:
        original: canonical functional ATen graph of one rank, ``meta["val"]`` set.
        rewritten: the graph that is to replace it, with the same placeholders.
        axis: the mesh axis over which it was rewritten.
        tokens: the token count T that is split over the axis.
        replicated: whether the graph input of that name is the same on every rank of the axis.
        rank_dependent: original nodes whose constants differ between the ranks.
        varying: symbols of sizes and numbers of the graph inputs that differ between the ranks.
    """
    numbered = Numbering.of(original, axis, replicated, rank_dependent, varying)
    return _Prover(numbered, rewritten, axis, tokens).run()


class _Prover:
    def __init__(self, original: Numbering, rewritten: fx.GraphModule, axis: Axis, tokens: sympy.Expr) -> None:
        self.original, self.gm, self.axis = original, rewritten, axis
        self.split = Split.of(tokens, axis.size, axis.rank, axis.layout)
        self.numbering = Arguments(rewritten, axis)
        self.moves = Mover(original, self.numbering, axis, self.split)
        self.picks = Picks(original, self.numbering, self.split)
        self.env: dict[fx.Node, tuple[Readings, ...]] = {}
        self.waiting: set[fx.Node] = set()
        self.failures: list[Failure] = []
        self.facts: dict[str, str] = {}
        self.same: set[str] = set()

    def run(self) -> Proof:
        if self.original.varying & getattr(self.split.tokens, "free_symbols", set()):
            message = f"expected as many tokens on every rank; found that {self.split.tokens} differs"
            self.failures.append(Failure("placeholder", message))
        for node in self.gm.graph.nodes:
            try:
                self._visit(node)
            except Refused as refused:
                self.failures.append(Failure(node.name, f"{node.name}: {refused}"))
        self.failures += [Failure(name, message) for name, message in self.original.missing(self.numbering, self.gm)]
        trusts = tuple(sorted({op_name(n.target) for n in self.gm.graph.nodes if stated(op_name(n.target))}))
        return Proof(not self.failures, tuple(self.failures), self.facts, frozenset(self.same), trusts)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self.failures += check_outputs(node, self.original, self.numbering, self._instead, bool(self.failures))
            return None
        if self.numbering.visit_size(node, self._local_shape):
            return None
        if node.op in ("placeholder", "get_attr"):
            found: tuple[Readings, ...] = tuple((whole(v),) for v in self.original.source(node, self.gm))
        elif picked := self.picks.visit(node, self.env):
            found = (picked,)
        elif any(n not in self.env and n not in self.numbering.sizes for n in node.all_input_nodes):
            self.picks.check_reader(node, self.env)
            return None  # Row numbers of a pick; or the failure of an operand has been told.
        else:
            try:
                found = self._call(node)
            except Refused:
                if node in self.picks.facts:
                    return None
                raise
        found = tuple((*readings, *(v for r in readings for v in self.moves.alike(r))) for readings in found)
        check_shapes(node, [shape(readings[0].dims) for readings in found])
        self.env[node] = found
        if all(any(self._is_same(value) for value in readings) for readings in found):
            self.same.add(node.name)
        self.facts[node.name] = ", ".join(self.moves.describe(readings[0]) for readings in found)
        return None

    def _is_same(self, value: Value) -> bool:
        """Whether all ranks have the same: of padded rows, too, which each rank pads with zeros or gathers from all."""
        shared = all(self.original.replicated[content] for content, _ in value.pieces)
        return shared and not value.partial and value.extent != "L"

    def _local_shape(self, node: fx.Node) -> Shape:
        if node not in self.env:
            raise Refused(f"the size of {node} is asked for, which was not proven")
        return shape(self.env[node][0][0].dims)

    def _call(self, node: fx.Node) -> tuple[Readings, ...]:
        if is_wait(node):
            return self.env[node.all_input_nodes[0]]
        tensors = [n for n in node.all_input_nodes if n in self.env and n not in self.numbering.sizes]
        unready = next((n for n in tensors if n in self.waiting), None)
        if unready is not None:
            raise Refused(f"expected the wait_tensor of {unready}; found {unready} itself, which may not be there yet")
        if node.target is operator.getitem:
            if node.args[1] >= len(self.env[tensors[0]]):  # type: ignore[operator]
                raise Refused(f"expected a result that has rows; found number {node.args[1]} of {tensors[0]}", 2)
            return (self.env[tensors[0]][node.args[1]],)  # type: ignore[index]
        if any(len(self.env[n]) != 1 for n in tensors):
            raise Refused("expected its operands one by one; found a tuple")
        if communicates(node):
            self.waiting.add(node)
        readings = itertools.product(*(self.env[n][0] for n in tensors))
        found: list[tuple[Value, ...]] = []
        reasons: list[Refused] = []
        for values in itertools.islice(readings, MOST_READINGS):
            for attempt in (self.moves.moved, self._congruent):
                try:
                    found += attempt(node, dict(zip(tensors, values, strict=True)))
                except Refused as refused:
                    reasons.append(refused)
        if not found:
            raise max(reasons, key=lambda r: r.specific) if reasons else Refused("its operands were not proven")
        return tuple(tuple(dict.fromkeys(results)) for results in zip(*found, strict=True))

    # Computing on values.

    def _congruent(self, node: fx.Node, at: Mapping[fx.Node, Value]) -> list[tuple[Value, ...]]:
        """The original's call of the same op on the same values: of wholes, of rows, or of summands."""
        rows = {n: v for n, v in at.items() if v.extent == "L" and len(v.pieces) == 1}
        others = {n: v for n, v in at.items() if n not in rows}
        bad = None if self.numbering.reads_no_data(node) else next((n for n, v in others.items() if not v.whole), None)
        if bad is not None:
            found = self.moves.describe(others[bad])
            raise Refused(f"expected {bad} whole or as rows; found {found}: drop the pad rows first")
        if not rows or self.numbering.reads_no_data(node):
            repeated = self._repeated(node, others)
            try:
                return [self._on_wholes(node, others), *repeated]
            except Refused:
                if not repeated:
                    raise
                return repeated
        return self._on_rows(node, rows, others)

    def _on_wholes(self, node: fx.Node, at: Mapping[fx.Node, Value]) -> tuple[Value, ...]:
        if not any(v.partial for v in at.values()):
            views = self._found(node, {n: (v.content, v.dims) for n, v in at.items()})
            if views is not None:
                return tuple(whole(v) for v in views)
        sums = {n: p for n, v in at.items() if (p := v if v.partial else self.moves.as_partial(v)) is not None}
        mixed = [n for n in at if n not in sums]
        if sums and (is_linear(node, sums.keys(), at.keys()) or self._sums_of_sums(node)):
            varying = next((n for n in mixed if not self.original.replicated[at[n].content]), None)
            if varying is not None:
                raise Refused(f"expected {varying}, a factor of a sum, to be the same on all ranks; it differs", 2)
            views = self._found(node, {n: (v.content, v.dims) for n, v in {**at, **sums}.items()})
            if views is not None:
                return tuple(replace(whole(v), partial=True) for v in views)
        if any(v.partial for v in at.values()):
            found = ", ".join(f"{n}: {self.moves.describe(v)}" for n, v in at.items())
            raise Refused(f"expected an op linear in its summands; found {told_op(node)} of {found}: reduce first", 2)
        found = ", ".join(self.moves.describe(v) for v in at.values()) or "no values"
        raise Refused(f"expected a call of the original; found {told_op(node)} of {found} with other arguments")

    def _sums_of_sums(self, node: fx.Node) -> bool:
        """Whether ``node`` is a sum over another group, and of summands makes summands of what it makes of the sum."""
        linear = _is_reduction(node) and self.numbering.arguments(node)["reduce_op"] in ("sum", "avg")
        return linear and self.original.holdings.passes_sums(group_name_of(node))

    def _on_rows(
        self, node: fx.Node, rows: Mapping[fx.Node, Value], others: Mapping[fx.Node, Value]
    ) -> list[tuple[Value, ...]]:
        varying = next((n for n, v in others.items() if v.partial or not self.original.replicated[v.content]), None)
        if varying is not None:
            differs = self.moves.describe(others[varying])
            raise Refused(
                f"expected {varying} ({differs}) to be the same on all ranks, as it meets rows; it differs", 3
            )
        reason = Refused(f"expected whole tokens in one dim of each operand; {told_op(node)} reads interleaved ones", 1)
        found: list[tuple[Value, ...]] = []
        candidates = [self.split.wholes(v.dims, v.post) for v in rows.values()]
        for wholes in itertools.islice(itertools.product(*candidates), MOST_READINGS):
            at = {n: (v.content, dims) for (n, v), (dims, _) in zip(rows.items(), wholes, strict=True)}
            at |= {n: (v.content, v.dims) for n, v in others.items()}
            split = {n: where for n, (_, where) in zip(rows, wholes, strict=True)}
            try:
                found.append(tuple(self._row_wise(node, at, split)))
            except Refused as refused:
                reason = max(reason, refused, key=lambda r: r.specific)
        if not found:
            raise reason
        return found

    def _repeated(self, node: fx.Node, at: Mapping[fx.Node, Value]) -> list[tuple[Value, ...]]:
        """This rank's rows of what is alike in every row: a constant, or one row of a whole value, expanded."""
        if op_name(node.target) not in REPEATING:
            return []
        sizes = tuple(self.numbering.arguments(node)["size"])
        reads = () if self.numbering.reads_no_data(node) else tuple(at.values())
        if any(v.partial or not v.whole for v in reads):
            return []
        found: list[tuple[Value, ...]] = []
        for dim, size in enumerate(sizes):
            outer = divide(size, self.split.local)
            source = [shape(v.dims)[dim - len(sizes) :][:1] for v in reads if dim >= len(sizes) - len(v.dims)]
            if outer is None or size == -1 or any(s != (1,) for s in source):
                continue
            wanted = (*sizes[:dim], times(outer, self.split.tokens), *sizes[dim + 1 :])
            views = self._found(node, {n: (v.content, v.dims) for n, v in at.items()}, wanted)
            if views is not None and self.original.replicated[views[0][0]] and -1 not in sizes:
                pre, post = times(product(sizes[:dim]), outer), product(sizes[dim + 1 :])
                found.append((Value(((views[0][0], post),), row_major(sizes), "L", pre, post),))
        return found

    def _found(self, node: fx.Node, at: Mapping[fx.Node, View], sizes: Shape | None = None) -> tuple[View, ...] | None:
        """Results of the original's call of the same op on ``at``, None if it makes no such call."""
        key = self.numbering.key(node, at, self.original.volatile, sizes)
        if key in self.original.numbers:
            self.numbering.sizes[node] = self.original.numbers[key]
        return self.original.calls.get(key)

    def _row_wise(self, node: fx.Node, at: Mapping[fx.Node, View], split: Mapping[fx.Node, Rows]) -> list[Value]:
        """This rank's rows of the results."""
        views = self._found(node, at, self._whole_sizes(node, at, split))
        if views is None:
            found = ", ".join(("rows of " if n in split else "") + self.original.name(v) for n, v in at.items())
            raise Refused(f"expected a call of the original; found {told_op(node)} of {found}", 1)
        out = tuple(shape(dims) for _, dims in views)
        call = Call(node, {n: shape(dims) for n, (_, dims) in at.items()}, split, out)
        where = self._reduced_rows(call) if _is_reduction(node) else rows_of(call)
        if isinstance(where, str):
            raise Refused(f"expected an op that keeps rows apart; found {told_op(node)}: {where}; gather first", 2)
        made = []
        told = results_by_rows(node, len(views))
        for (content, _), sizes in zip(views[:told], out[:told], strict=True):
            if not self.original.replicated[content]:
                raise Refused(f"expected the same {told_op(node)} on all ranks; its result differs between them", 3)
            dim = where.dim
            if sizes[dim] != product((where.outer, self.split.tokens, where.inner)):
                raise Refused(f"expected {self.split.tokens} tokens in dim {dim} of the result; found {sizes[dim]}", 1)
            pre, post = times(product(sizes[:dim]), where.outer), times(where.inner, product(sizes[dim + 1 :]))
            local = product((where.outer, self.split.local, where.inner))
            made.append(Value(((content, post),), row_major((*sizes[:dim], local, *sizes[dim + 1 :])), "L", pre, post))
        return made

    def _reduced_rows(self, call: Call) -> Rows | str:
        """An all-reduce of rows: those of the reduced whole only if all its ranks have the same rows."""
        group = group_name_of(call.node)
        if self.original.holdings.reduces_rows(group):
            return pointwise(call)
        return f"the ranks of group {group!r} are not known to hold the same rows"

    def _whole_sizes(self, node: fx.Node, at: Mapping[fx.Node, View], split: Mapping[fx.Node, Rows]) -> Shape | None:
        """Sizes among the arguments as the original has them, where they name this rank's rows."""
        if op_name(node.target) != "aten::expand":
            return None
        (source,) = split
        sizes = list(self.numbering.arguments(node)["size"])
        ndim, where = len(at[source][1]), split[source]
        dim = where.dim + len(sizes) - ndim
        if not same(sizes[dim], product((where.outer, self.split.local, where.inner))) and sizes[dim] != -1:
            raise Refused(f"expected this rank's rows in dim {dim}; found size {sizes[dim]}", 2)
        sizes[dim] = product((where.outer, self.split.tokens, where.inner))
        return tuple(sizes)

    # Checks and words.

    def _instead(self, node: fx.Node, wanted: View) -> str | None:
        """What an output was shown to be instead of ``wanted``; ``""`` if it is that, None if nothing is known."""
        if node not in self.env:
            return None
        readings = self.env[node][0]
        if node not in self.waiting and whole(wanted) in readings:
            return ""
        return f"{self.moves.describe(readings[0])}: gather or reduce it"


def _is_reduction(node: fx.Node) -> bool:
    return op_name(node.target) == "_c10d_functional::all_reduce"
