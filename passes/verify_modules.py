"""The static proof of module tensor parallelism: that sharing weights over a group of ranks changes no rank's answers.

Translation validation as in ``verify_static``, by other rules: here every rank has rows of its own, and what is shared
is weights. Every value of the shared graph is shown to be an original value, whole, padded, of all ranks, a part of its
columns, or a summand (``verify_module_values``); moves are followed by index arithmetic (``verify_module_moves``) and
ops by a table (``verify_module_rules``, ``verify_module_lookups``). All else is the original's own calls.

Supposes that all ranks of a group run such a graph (ranks without rows, the idle one), hold equal whole weights, and
where each has rows of its own run the same original graph with the same constants.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import group_name_of, is_wait
from cpcompile.passes.verify_arguments import Arguments, Refused, View, aliases, communicates, op_name, reshaped
from cpcompile.passes.verify_index import Shape, divide, product, regroup, shape, times
from cpcompile.passes.verify_module_calls import NO_AXIS, Calls, is_elementwise
from cpcompile.passes.verify_module_counts import Counts, RowCount, RowNumbers
from cpcompile.passes.verify_module_lookups import Lookup, Lookups
from cpcompile.passes.verify_module_moves import Moves
from cpcompile.passes.verify_module_rules import Rules
from cpcompile.passes.verify_module_values import Cut as ColumnCut
from cpcompile.passes.verify_module_values import Form, Value, broadcast, forms_of, value_of
from cpcompile.passes.verify_proof import Failure, Proof, check_outputs, check_shapes, told_op
from cpcompile.passes.weight_cuts import Cut

MOST_READINGS = 16


Reading: TypeAlias = Value | Lookup | RowCount
Readings: TypeAlias = tuple[Reading, ...]


def prove_modules(
    original: fx.GraphModule,
    shared: fx.GraphModule,
    cuts: Mapping[str, Cut],
    axes: Mapping[str, Axis],
    *,
    group_tokens: str | int,
    same: Collection[str] = (),
    equal: Collection[str] = (),
) -> Proof:
    """Prove that every output of ``shared`` equals that of ``original``, whatever rows the other ranks have.

    Args:
        original: functional ATen graph of one rank, its weights whole, ``meta["val"]`` set.
        shared: the graph that is to replace it, with the same placeholders.
        cuts: graph input → how this rank's part of it was cut.
        axes: graph input → the ranks that share it.
        group_tokens: ``"exchange"``: ranks agree on N by exchanging their R; ``"equal"``: the caller states that all
            ranks of a group have as many rows; a number is N, which the caller checks R against.
        same: original nodes that the caller states to be the same on all ranks of every group: weights that are not
            cut and are read beside those that are, and the tokens' values where a group's ranks have the same tokens.
        equal: names of groups whose ranks have as many rows as each other, whatever ``group_tokens`` says.

    Raises:
        ValueError: ``group_tokens`` is none of these.
    """
    if group_tokens not in ("exchange", "equal") and not isinstance(group_tokens, int):
        raise ValueError(f"group_tokens is {group_tokens!r}: expected 'exchange', 'equal' or a number of rows")
    fixed = group_tokens if isinstance(group_tokens, int) else None
    numbers = RowNumbers(fixed, None if group_tokens == "equal" else equal)
    return _Prover(Calls.of_graph(original), shared, dict(cuts), dict(axes), numbers, same).run()


class _Prover:
    def __init__(
        self,
        original: Calls,
        shared: fx.GraphModule,
        cuts: Mapping[str, Cut],
        axes: Mapping[str, Axis],
        numbers: RowNumbers,
        same_nodes: Collection[str],
    ) -> None:
        self.original, self.gm, self.cuts, self.axes = original, shared, cuts, axes
        self.numbers, self.same_nodes = numbers, frozenset(same_nodes)
        self.arguments = Arguments(shared, NO_AXIS)
        self.groups = {axis.group_name: axis for axis in axes.values()}
        self.moves = Moves(numbers, self.groups, self.original.size_of, self._is_common)
        self.rules = Rules(original, self.arguments, self._is_common)
        self.lookups = Lookups(self.rules, self.arguments)
        self.counts = Counts(self.arguments, self.groups, numbers)
        self.common: dict[str, frozenset[int]] = {}
        self.env: dict[fx.Node, tuple[Readings, ...]] = {}
        self.waiting: set[fx.Node] = set()
        self.failures: list[Failure] = []
        self.facts: dict[str, str] = {}

    def run(self) -> Proof:
        for node in self.gm.graph.nodes:
            try:
                self._visit(node)
            except Refused as refused:
                self.failures.append(Failure(node.name, f"{node.name}: {refused}"))
        others = [*self.original.missing(self.arguments, self.gm), *self._bad_cuts()]
        self.failures += [Failure(name, message) for name, message in others]
        return Proof(not self.failures, tuple(self.failures), self.facts)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self.failures += check_outputs(node, self.original, self.arguments, self._instead, bool(self.failures))
            return None
        if self._is_number(node) or self.arguments.visit_size(node, self._local_shape):
            return None
        if node.op in ("placeholder", "get_attr"):
            found: tuple[Readings, ...] = self._source(node)
        elif any(n not in self.env and n not in self.arguments.sizes for n in node.all_input_nodes):
            return None  # The failure of an operand has been told.
        else:
            found = self._call(node)
        check_shapes(node, [_sizes(readings[0]) for readings in found])
        self.env[node] = found
        self.facts[node.name] = ", ".join(self._describe(readings[0]) for readings in found)
        return None

    def _is_number(self, node: fx.Node) -> bool:
        """N, where ranks have agreed on it; noted among the sizes."""
        fact = self.counts.number(node, self.env.get(node.all_input_nodes[0], ((),))[0]) if node.all_input_nodes else ""
        if fact:
            self.facts[node.name] = fact
        return bool(fact)

    def _local_shape(self, node: fx.Node) -> Shape:
        if node not in self.env:
            raise Refused(f"the size of {node} is asked for, which was not proven")
        return _sizes(self.env[node][0][0])

    def _source(self, node: fx.Node) -> tuple[Readings, ...]:
        """A graph input: whole, or this rank's part."""
        views = self.original.source(node, self.gm)
        cut = self.cuts.get(node.name) if node.op == "placeholder" else None
        if cut is None:
            return tuple((Value(*view),) for view in views)
        (view,), axis = views, self.axes.get(node.name)
        if axis is None or axis.size != cut.parts:
            raise Refused(f"expected the {cut.parts} ranks that share it; found {axis}", 3)
        sizes = shape(view[1])
        parts = times(cut.segments, cut.parts)
        inner = divide(sizes[cut.dim], parts) if 0 <= cut.dim < len(sizes) else None
        if inner is None or cut.segments < 1:
            raise Refused(f"expected a dim that {parts} divides; found dim {cut.dim} of {list(sizes)}", 3)
        if view[0] in self.original.volatile:
            raise Refused("expected a weight that nothing writes into", 3)
        part = value_of(Form(view, cut=ColumnCut(cut.dim, cut.segments, inner), axis=axis), product(sizes))
        assert part is not None  # a graph input is row-major
        return ((part,),)

    def _bad_cuts(self) -> Iterator[tuple[str, str]]:
        names = {n.name for n in self.gm.graph.find_nodes(op="placeholder")}
        for name in sorted(set(self.cuts) - names):
            yield name, f"{name}: expected a graph input of this name to be cut; there is none"

    # Calls.

    def _call(self, node: fx.Node) -> tuple[Readings, ...]:
        if is_wait(node):
            return self.env[node.all_input_nodes[0]]
        tensors = [n for n in node.all_input_nodes if n in self.env]
        unready = next((n for n in tensors if n in self.waiting), None)
        if unready is not None:
            raise Refused(f"expected the wait_tensor of {unready}; found {unready} itself, which may not be there yet")
        if node.target is operator.getitem:
            return (self.env[tensors[0]][node.args[1]],)  # type: ignore[index]
        if any(len(self.env[n]) != 1 for n in tensors):
            raise Refused("expected its operands one by one; found a tuple")
        if communicates(node):
            self.waiting.add(node)
        found: list[tuple[Reading, ...]] = []
        reasons: list[Refused] = []
        readings = itertools.product(*(self.env[n][0] for n in tensors))
        for values in itertools.islice(readings, MOST_READINGS):
            for attempt in (self._whole, self.counts.counted, self._moved, self._ruled):
                try:
                    found += attempt(node, dict(zip(tensors, values, strict=True)))
                except Refused as refused:
                    reasons.append(refused)
        if not found:
            raise max(reasons, key=lambda r: r.specific) if reasons else Refused(f"nothing is known of {told_op(node)}")
        return tuple(tuple(dict.fromkeys(results)) for results in zip(*found, strict=True))

    def _whole(self, node: fx.Node, at: Mapping[fx.Node, Reading]) -> list[tuple[Reading, ...]]:
        """The original's call on the same values."""
        views = {n: v.view for n, v in at.items() if isinstance(v, Value) and v.whole}
        if len(views) != len(at):
            return []
        key = self.arguments.key(node, views, self.original.volatile)
        if key in self.original.numbers:
            self.arguments.sizes[node] = self.original.numbers[key]
        found = self.original.calls.get(key)
        if found is None:
            names = ", ".join(self.original.name(v) for v in views.values()) or "no values"
            raise Refused(f"expected a call of the original; found {told_op(node)} of {names} with other arguments")
        return [tuple(Value(*view) for view in found)]

    def _moved(self, node: fx.Node, at: Mapping[fx.Node, Reading]) -> list[tuple[Reading, ...]]:
        """What views, padding, slices and collectives make of one value."""
        name, args = op_name(node.target), self.arguments.arguments(node)
        value = next(iter(at.values())) if len(at) == 1 else None
        if isinstance(value, Lookup) and communicates(node):
            raise Refused("expected a masked lookup in this rank's rows of a table; found its mask missing", 3)
        if not isinstance(value, Value) or node.args[0] not in at:
            return []
        if value.content in self.original.volatile and not (aliases(node) and value.whole):
            raise Refused("expected a value that nothing writes into; found one that is written in place", 3)
        dims = reshaped(node, args, value.dims, not value.whole)
        if dims is not None:
            return [(replace(value, dims=dims),)]
        if name == "aten::constant_pad_nd":
            return [(self.moves.padded(value, args),)]
        if name == "aten::slice":
            return [(v,) for v in self.moves.narrowed(value, args)]
        if communicates(node):
            axis = self.groups.get(group_name_of(node))
            if axis is None:
                raise Refused(f"expected a group that shares weights; found {group_name_of(node)}", 3)
            return [(self.moves.communicated(name.removeprefix("_c10d_functional::"), value, axis, args),)]
        return []

    def _ruled(self, node: fx.Node, at: Mapping[fx.Node, Reading]) -> list[tuple[Reading, ...]]:
        """What ops make of rows and columns."""
        if any(isinstance(v, RowCount) for v in at.values()) or communicates(node) or not at:
            return []
        begins = op_name(node.target) == "aten::sub"  # a lookup, in whole ids
        if all(isinstance(v, Value) and v.whole for v in at.values()) and not begins:
            return []
        shapes = {n: _sizes(v) for n, v in at.items()}
        choices = [forms_of(v, self.original.size_of(v.content)) if isinstance(v, Value) else [v] for v in at.values()]
        found: list[tuple[Reading, ...]] = []
        reasons: list[Refused] = []
        for forms in itertools.islice(itertools.product(*choices), MOST_READINGS):
            given: dict[fx.Node, Any] = dict(zip(at, forms, strict=True))
            try:
                found.append(self._made(node, given, shapes))
            except Refused as refused:
                reasons.append(refused)
        if not found and reasons:
            raise max(reasons, key=lambda r: r.specific)
        if not found:
            raise Refused(f"expected rows and columns in their order; {told_op(node)} reads permuted ones", 1)
        return found

    def _made(
        self, node: fx.Node, given: Mapping[fx.Node, Any], shapes: Mapping[fx.Node, Shape]
    ) -> tuple[Reading, ...]:
        step = self.lookups.followed(node, given, shapes)
        if isinstance(step, Lookup):
            return (step,)
        if step is None and any(isinstance(v, Lookup) for v in given.values()):
            raise Refused(f"expected a masked lookup in this rank's rows of a table; found {told_op(node)}", 3)
        forms = [step] if step is not None else self.rules.results(node, given, shapes)
        results: list[Reading] = []
        for form in forms:
            value = value_of(form, self.original.size_of(form.view[0]))
            if value is None:
                raise Refused("expected columns that can be told apart; found them permuted", 1)
            sizes = broadcast(list(shapes.values())) if is_elementwise(node) else None
            dims = value.dims if sizes is None or step is not None else regroup(value.dims, sizes)
            if dims is None:
                raise Refused(f"expected a result of shape {list(sizes or ())}; found other rows", 2)
            results.append(replace(value, dims=dims))
        return tuple(results)

    # What is known of contents.

    def _is_common(self, content: int, axis: Axis | None) -> bool:
        """Whether a content is the same on all ranks of ``axis``."""
        name = axis.group_name if axis is not None else ""
        if name not in self.common:
            cut = {p for p, a in self.axes.items() if a.group_name == name and p in self.cuts}
            self.common[name] = self.original.common(self.same_nodes | cut)
        return content in self.common[name]

    # Checks and words.

    def _instead(self, node: fx.Node, wanted: View) -> str | None:
        """What an output was shown to be instead of ``wanted``; ``""`` if it is that, None if nothing is known."""
        if node not in self.env:
            return None
        readings = self.env[node][0]
        return "" if node not in self.waiting and Value(*wanted) in readings else self._describe(readings[0])

    def _describe(self, reading: Reading) -> str:
        if isinstance(reading, RowCount):
            who = f"the most of any rank of {reading.axis.group_name}: " if reading.axis is not None else ""
            return f"numbers of rows, {who}{', '.join(map(str, reading.rows))}"
        if isinstance(reading, Lookup):
            return f"masked lookup, {reading.stage}, of {self.original.name(reading.ids.view)}"
        if reading.whole:
            return f"Whole of {self.original.name(reading.view)}"
        rows = "all ranks' rows" if reading.gathered else "padded rows" if reading.base is not None else "rows"
        part = "this rank's part of " if reading.part is not None else ""
        forms = forms_of(reading, self.original.size_of(reading.content))
        name = self.original.name(forms[0].view if forms else (reading.content, None))
        return f"{'Partial, ' if reading.partial else ''}{part}{rows} of {name}"


def _sizes(reading: Reading) -> Shape:
    return shape(reading.dims) if isinstance(reading, Value) else reading.sizes
