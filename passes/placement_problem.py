"""From an annotated graph to a placement problem: what may be placed, what it costs in T, and who demands what.

A *choice* is an op that may run on a shard: replicated on the axis and row-wise by the table, or an all-reduce of
the axis (its input is a partial sum). Views are free at every placement, so they stand for the value that they
view. Everything else needs whole operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
import torch.fx as fx

from cpcompile.costs import PICOSECONDS, HardwareProfile
from cpcompile.passes.collectives import op_name
from cpcompile.passes.fused_attention import FUSED
from cpcompile.passes.mincut import OpChoice, P, Problem, R, S, Use, ValueChoice
from cpcompile.passes.op_call import UNUSED, Mixing, RowWise
from cpcompile.passes.picked_rows import Picks
from cpcompile.passes.placement_rules import find_rule
from cpcompile.passes.token_dims import Annotation
from cpcompile.passes.token_layout import Expr, Shape, TokenDim, counted, product

# Same elements, other shape: free at any placement. A slice over all tokens counts too.
VIEWS = frozenset(
    f"aten::{n}"
    for n in ("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze")
)
_PRODUCTS = frozenset({"aten::mm", "aten::bmm", "aten::linear", "aten::addmm"})
# FLOPs of an op, from the shapes of its operands and of its result. Ops that are not here only move data.
_FLOPS: Mapping[str, Callable[[Sequence[Shape], Shape], Expr]] = {
    **dict.fromkeys(_PRODUCTS - {"aten::addmm"}, lambda shapes, out: 2 * product(out) * shapes[0][-1]),
    "aten::addmm": lambda shapes, out: 2 * product(out) * shapes[1][-1],
    # Gate, factor and result for every slot.
    "cpcompile::routed_experts": lambda shapes, out: (
        2 * product(shapes[1]) * (shapes[3][-2] * shapes[3][-1] + shapes[4][-2] * shapes[4][-1])
    ),
    **dict.fromkeys(FUSED, lambda shapes, out: 2 * (product(shapes[0]) + product(out)) * shapes[1][-2]),
    # Every key for every row and head; then, of the chosen keys, twice the latent and once the rotated part.
    "cpcompile::lightning_indexer": lambda shapes, out: 2 * product(shapes[0]) * shapes[1][1],
    "cpcompile::sparse_attention": lambda shapes, out: (
        2 * product(shapes[0][:3]) * shapes[2][-1] * (2 * shapes[0][-1] + shapes[3][-1])
    ),
    # Of the keys, all that a row's blocks can hold.
    "cpcompile::paged_lightning_indexer": lambda shapes, out: 2 * product(shapes[0]) * _held(shapes[1], shapes[4]),
    "cpcompile::paged_sparse_attention": lambda shapes, out: (
        2 * product(shapes[0][:2]) * shapes[2][-1] * (2 * shapes[0][-1] + shapes[3][-1])
    ),
    "cpcompile::paged_attention": lambda shapes, out: (
        2 * product(shapes[0][:2]) * _held(shapes[1], shapes[5]) * (2 * shapes[0][-1] + shapes[2][-1])
    ),
}
# Divided by itself or taken from a scalar, a sum of partial values is no partial value of the result.
_NUMERATOR_ONLY = frozenset({"aten::div"})

# Picoseconds by which an op on partial sums must beat one on whole values: it moves roundings, so ties keep the graph.
CARRYING_PARTS = 100_000

Polynomial = tuple[float, ...]


@dataclass
class Choice:
    """One op that may be placed.

    Args:
        node: the op.
        seconds: compute time on all rows, as polynomial coefficients in T (constant first).
        partial: whether it may run on partial sums.
        reduced: whether it is an all-reduce of the axis: its value starts as a partial sum.
        gathered: whether it is an all-gather of the axis: its value starts as a shard.
        picks: whether it takes a few rows: of shards as a partial sum, of whole rows as it is, and never as a shard.
    """

    node: fx.Node
    seconds: Polynomial
    partial: bool
    reduced: bool
    gathered: bool = False
    picks: bool = False


@dataclass
class PlacementGraph:
    """The choices, their values and uses, with costs still symbolic in T.

    Args:
        known: the annotation that it was built from.
        hardware: the profile that its costs are of.
        choices: in graph order.
        values: value node → (choice number, bytes as polynomial in T: of each token; of a choice that picks, of all).
        origin: every node that is a view of a value → that value.
        uses: (value node, choice number or None, demanded labels at P, S, R).
        consumers: value node → (consumer, reason) for consumers that need it whole.
        number: op node → its choice number.
        hints: sizes of the traced example, for symbols other than T.
    """

    known: Annotation
    hardware: HardwareProfile
    choices: list[Choice] = field(default_factory=list)
    values: dict[fx.Node, tuple[int, Polynomial]] = field(default_factory=dict)
    origin: dict[fx.Node, fx.Node] = field(default_factory=dict)
    uses: list[tuple[fx.Node, int | None, tuple[int, int, int]]] = field(default_factory=list)
    consumers: dict[fx.Node, list[tuple[fx.Node, str]]] = field(default_factory=dict)
    number: dict[fx.Node, int] = field(default_factory=dict)
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)

    def problem(self, tokens: int, hardware: HardwareProfile) -> Problem:
        """The problem at ``tokens`` tokens, in picoseconds; a shard holds its pad rows too."""
        size, local = self.known.axis.size, self.known.axis.rows(tokens)
        ops = []
        for choice in self.choices:
            if choice.gathered:
                ops.append(OpChoice(choice.node.name, (None, 0, None)))
                continue
            whole = _picoseconds(evaluate(choice.seconds, tokens))
            shard = whole * local // tokens if tokens else whole
            at_p = 0 if choice.reduced else whole + CARRYING_PARTS if choice.partial else None
            # All tokens of the other operands are there for a shard's rows: the cost per row does not change.
            labels = (at_p, None, None) if choice.reduced else (at_p, shard, whole)
            ops.append(OpChoice(choice.node.name, (CARRYING_PARTS, None, 0) if choice.picks else labels))
        values: list[ValueChoice] = []
        index: dict[fx.Node, int] = {}
        for node, (number, per_token) in self.values.items():
            index[node] = len(values)
            if self.choices[number].picks:
                moved = evaluate(per_token, tokens) * hardware.seconds_per_byte(size)
                price = _picoseconds(hardware.all_reduce_latency) + 2 * _picoseconds(moved)
                values.append(ValueChoice(number, None, None, price))
                continue
            whole_bytes = evaluate(per_token, tokens) * tokens
            padded_bytes = evaluate(per_token, tokens) * local * size
            half = _picoseconds(hardware.latency) + _picoseconds(padded_bytes * hardware.seconds_per_byte(size))
            # Twice the rounded half, not a rounding of its own: where they are equal the cut is exact.
            reduce = _picoseconds(hardware.all_reduce_latency) + 2 * _picoseconds(
                whole_bytes * hardware.seconds_per_byte(size)
            )
            can_reduce = self.choices[number].reduced or self.choices[number].partial
            values.append(ValueChoice(number, half if can_reduce else None, half, reduce if can_reduce else None))
        return Problem(ops, values, [Use(index[v], c, d) for v, c, d in self.uses])


def _held(cache: Shape, table: Shape) -> Expr:
    """Keys that the blocks of one row of a block table hold."""
    return table[1] * cache[1]


def _picoseconds(seconds: float) -> int:
    return round(seconds * PICOSECONDS)


def evaluate(polynomial: Polynomial, tokens: int) -> float:
    """Value of a polynomial (constant first) at ``tokens``."""
    return sum(c * float(tokens) ** power for power, c in enumerate(polynomial))


def polynomial_in(expr: Expr, tokens: Expr, hint: Callable[[sympy.Symbol], int]) -> Polynomial:
    """Coefficients of ``expr`` in T; other symbols take their hints, and non-polynomials their value there."""
    if not tokens.is_Symbol:
        count = sympy.Dummy(integer=True, nonnegative=True)
        counts = counted(expr, tokens, count)
        expr, tokens = (counts, count) if counts.has(count) else (expr, tokens)
    others = {s: hint(s) for s in expr.free_symbols if s != tokens}
    expr = expr.subs(others) if others else expr
    if expr.is_number:
        return (float(expr),)
    try:
        coefficients = sympy.Poly(expr, tokens).all_coeffs()
    except (sympy.PolynomialError, sympy.GeneratorsError):
        return (float(expr.subs({s: hint(s) for s in expr.free_symbols})),)
    return tuple(float(c) for c in reversed(coefficients))


def build(known: Annotation, hardware: HardwareProfile) -> PlacementGraph:
    """Collect choices, values and uses of an annotated graph."""
    graph = PlacementGraph(known, hardware)
    costs = _Costs(known, hardware)
    graph.hints = costs.hints
    for node, outcome in known.classes.items():
        if node in known.all_reduces:
            if isinstance(outcome, RowWise):
                _add_choice(graph, node, costs, reduced=True)
        elif node in known.gathers:
            _add_choice(graph, node, costs, gathered=True)
        elif isinstance(outcome, RowWise) and any(outcome.outputs) and node in known.replicated:
            _add_row_wise(graph, node, outcome, costs)
        elif isinstance(outcome, Picks) and _may_pick(graph, node, outcome):
            _add_picks(graph, node, outcome, costs)
    _add_whole_uses(graph)
    return graph


def _may_pick(graph: PlacementGraph, node: fx.Node, outcome: Picks) -> bool:
    """Owners are told from a row's number as contiguous rows have it."""
    known = graph.known
    return known.axis.layout == "contiguous" and outcome.source in graph.origin and node in known.replicated


def _add_choice(
    graph: PlacementGraph,
    node: fx.Node,
    costs: _Costs,
    *,
    reduced: bool = False,
    partial: bool = False,
    gathered: bool = False,
) -> int:
    number = len(graph.choices)
    seconds = (0.0,) if reduced or gathered else costs.seconds(node)
    graph.choices.append(Choice(node, seconds, partial, reduced, gathered))
    graph.number[node] = number
    if isinstance(node.meta["val"], torch.Tensor):
        graph.values[node] = (number, costs.bytes_per_token(node))
        graph.origin[node] = node
    return number


def _add_row_wise(graph: PlacementGraph, node: fx.Node, outcome: RowWise, costs: _Costs) -> None:
    source = node.all_input_nodes[0]
    if op_name(node.target) == "getitem":
        if source in graph.number:
            graph.values[node] = (graph.number[source], costs.bytes_per_token(node))
            graph.origin[node] = node
        return
    follows = isinstance(outcome.operands.get(source), TokenDim)  # not keys repeated for each query
    if (op_name(node.target) in VIEWS or outcome.identity) and source in graph.origin and follows:
        graph.origin[node] = graph.origin[source]
        return
    placed = [n for n in outcome.operands if n in graph.origin]
    if not placed and op_name(node.target) in VIEWS and follows:
        return  # a view of something whole: sliced where a shard is wanted
    partial = _may_be_partial(graph, node, placed)
    number = _add_choice(graph, node, costs, partial=partial)
    for operand in placed:
        demand = outcome.operands[operand]
        if demand is UNUSED:
            continue
        at_s = S if isinstance(demand, TokenDim) else R
        graph.uses.append((graph.origin[operand], number, (P if partial else S, at_s, R)))


def _add_picks(graph: PlacementGraph, node: fx.Node, outcome: Picks, costs: _Costs) -> None:
    """Rows of a shard are a partial sum (P needs S), rows of a whole are whole; the index is whole in both."""
    number = len(graph.choices)
    graph.choices.append(Choice(node, (0.0,), partial=False, reduced=False, picks=True))
    graph.number[node] = number
    graph.values[node] = (number, costs.bytes_of_all(node))
    graph.origin[node] = node
    graph.uses.append((graph.origin[outcome.source], number, (S, S, R)))
    if outcome.index in graph.origin:
        graph.uses.append((graph.origin[outcome.index], number, (R, R, R)))


def _may_be_partial(graph: PlacementGraph, node: fx.Node, placed: list[fx.Node]) -> bool:
    """Whether ``node`` maps partial sums to partial sums: linear, with constants for all else."""
    rule = find_rule(node)
    linear = rule.linear if rule is not None else ""
    partial = [n for n in placed if _origin_choice(graph, n).partial or _origin_choice(graph, n).reduced]
    if not linear or not partial or len(partial) != len(placed):
        return False
    tensors = [n for n in node.all_input_nodes if graph.known.shapes.get(n)]
    if linear == "additive":
        scalars = not isinstance(node.args[0], list | tuple) and not isinstance(node.args[1], fx.Node)
        return len(partial) == len(tensors) and not scalars
    if op_name(node.target) in _NUMERATOR_ONLY and node.args[0] is not partial[0]:
        return False
    return len(partial) == 1


def _origin_choice(graph: PlacementGraph, node: fx.Node) -> Choice:
    return graph.choices[graph.values[graph.origin[node]][0]]


def _add_whole_uses(graph: PlacementGraph) -> None:
    """Uses by everything that is no choice and no free view: it needs its operands whole."""
    for node in graph.known.shapes:
        if node in graph.number or node in graph.origin:
            continue
        if takes_rows(graph, node):
            graph.uses.append((graph.origin[rows_source(graph, node)], None, (S, S, S)))
            continue
        outcome = graph.known.classes.get(node)
        unused = {n for n, d in outcome.operands.items() if d is UNUSED} if isinstance(outcome, RowWise) else set()
        for operand in node.all_input_nodes:
            if operand in graph.origin and operand not in unused:
                value = graph.origin[operand]
                graph.uses.append((value, None, (R, R, R)))
                graph.consumers.setdefault(value, []).append((node, why_whole(graph, node)))
            elif operand in graph.number and operand not in unused:
                raise AssertionError(f"{node} reads the tuple {operand} whole")


def rows_source(graph: PlacementGraph, node: fx.Node) -> fx.Node:
    """The value of which ``node``, or the one reader of the split ``node``, takes this rank's rows."""
    return graph.known.own_rows.get(node) or node.all_input_nodes[0]


def takes_rows(graph: PlacementGraph, node: fx.Node) -> bool:
    """Whether ``node``, or the one reader of the split ``node``, takes exactly this rank's rows of a placed value."""
    own = graph.known.own_rows
    reader = next(iter(node.users), None)
    split = reader in own and reader.all_input_nodes[0] is node and op_name(node.target) == "aten::split"
    return (node in own or split) and rows_source(graph, node) in graph.origin


def why_whole(graph: PlacementGraph, node: fx.Node) -> str:
    """Why a consumer needs all rows of its operands, for the report."""
    if node.op == "output":
        return "the graph returns it whole"
    outcome = graph.known.classes.get(node)
    if isinstance(outcome, Mixing):
        return outcome.reason
    if node not in graph.known.replicated:
        return "its other operands differ between the ranks, so every rank needs every row"
    return "it is not placed"


class _Costs:
    """Costs of ops and sizes of values, remembered by shape: layers repeat."""

    def __init__(self, known: Annotation, hardware: HardwareProfile) -> None:
        assert known.tokens is not None
        self.known, self.tokens, self.hardware = known, known.tokens, hardware
        self.hints: dict[sympy.Symbol, int] = {}
        for node in known.shapes:
            self._remember_hints(node)
        self.polynomial = functools.cache(self._polynomial)

    def _remember_hints(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.SymInt | torch.Tensor):
            sizes = [value] if isinstance(value, torch.SymInt) else value.shape
            for s in sizes:
                if isinstance(s, torch.SymInt) and isinstance(s.node.expr, sympy.Symbol) and s.node.has_hint():
                    self.hints.setdefault(s.node.expr, int(s.node.hint))

    def _polynomial(self, expr: Expr) -> Polynomial:
        return polynomial_in(expr, self.tokens, lambda s: self.hints.get(s, 1))

    def bytes_per_token(self, node: fx.Node) -> Polynomial:
        """Bytes of one token's row of a value."""
        return self.polynomial(product(self.known.shapes[node][0]) / self.tokens * node.meta["val"].element_size())

    def bytes_of_all(self, node: fx.Node) -> Polynomial:
        """Bytes of a whole value."""
        return self.polynomial(product(self.known.shapes[node][0]) * node.meta["val"].element_size())

    def seconds(self, node: fx.Node) -> Polynomial:
        """Compute time of an op on all rows: the data of the token-carrying operands and results, and its FLOPs.

        Weights are read whole at every placement, so they cancel and are left out.
        """
        outcome = self.known.classes[node]
        assert isinstance(outcome, RowWise)
        carried = [n for n, d in outcome.operands.items() if isinstance(d, TokenDim)]
        moved: Expr = sympy.Integer(0)
        flops: Expr = sympy.Integer(0)
        if op_name(node.target) not in VIEWS | {
            "aten::slice",
            "aten::select",
            "aten::split",
            "aten::split_with_sizes",
            "aten::chunk",
        }:
            # An elementwise op is taken to be fused with its producer: it costs what it writes.
            for operand in [*carried, node] if op_name(node.target) in _PRODUCTS else [node]:
                value = operand.meta["val"]
                for shape, tensor in zip(
                    self.known.shapes[operand], value if isinstance(value, list | tuple) else [value], strict=True
                ):
                    if isinstance(tensor, torch.Tensor):
                        moved += product(shape) * tensor.element_size()
        if op_name(node.target) in _FLOPS:
            shapes = [self.known.shapes[n][0] for n in node.args if isinstance(n, fx.Node) and self.known.shapes.get(n)]
            flops = _FLOPS[op_name(node.target)](shapes, self.known.shapes[node][0])
        width = max(len(self.polynomial(moved)), len(self.polynomial(flops)))
        m, f = ((*p, *[0.0] * (width - len(p))) for p in (self.polynomial(moved), self.polynomial(flops)))
        return tuple(self.hardware.compute(a, b) for a, b in zip(f, m, strict=True))


def latency_free(hardware: HardwareProfile) -> HardwareProfile:
    """The same machine with free launches: what large token counts look like."""
    return HardwareProfile(
        hardware.name, hardware.bandwidth, 0.0, 0.0, hardware.flops, hardware.memory_bandwidth, hardware.source
    )
