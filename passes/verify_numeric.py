"""The numeric check: all ranks' rewritten graphs and the original one, in lockstep on random inputs, in one process.

Values are compared in float64: what a rewrite may change is the order of sums, and in float64 that is some 1e-15, while
a wrong row, rank or weight stays as large as it is. So one tight bound serves every model dtype, and discrete choices
(a router's or an indexer's top-k) do not flip: that takes two scores closer than rounding. Exact ties, such as masked
scores, are broken row by row and so alike in both graphs. The graphs also run once in their own dtypes, for those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from cpcompile.axes import Axis
from cpcompile.passes.collectives import op_name
from cpcompile.passes.lockstep import LockstepError, RankProgram, run_lockstep
from cpcompile.passes.lockstep_collectives import RULES, bind
from cpcompile.passes.materialise import materialise
from cpcompile.passes.placement_problem import VIEWS, PlacementGraph
from cpcompile.passes.token_layout import Expr, size_expr
from cpcompile.passes.widen import CASTS, wide, widened
from cpcompile.plan import Interval

MOST_BYTES = 4 * 2**30
# Weights small enough not to blow up a deep model; 1-d ones (norms) wide, else the residual drowns what they scale.
SCALES = (1.0, 0.1)
# Sizes that the token count does not give.
SMALL = 2


def tolerance(dtype: torch.dtype) -> float:
    """Relative error (of the 2-norm of a whole output) up to which two results of ``dtype`` count as equal.

    float64, in which values are compared: ``eps ** 0.75``, 1.8e-12. Sums in another order come out at some 1e-15; the
    rest is left to depth and conditioning, and one wrong row of a million still is 1e-3. For a graph that has no
    float64 form (bit casts, kernels of one dtype): ``64 * eps`` of its coarsest dtype, 7.6e-6 for float32 and 0.5 for
    bfloat16, where it finds wrong ranks and weights, and wrong rows only among few.
    """
    eps = torch.finfo(dtype).eps
    return float(eps**0.75) if dtype in (torch.float64, torch.complex128) else 64 * eps


def check_numerically(
    original: fx.GraphModule,
    graph: PlacementGraph,
    interval: Interval,
    replicated: Callable[[str], bool],
    varying: Collection[sympy.Basic] = (),
    *,
    seed: int = 0,
    token_counts: Sequence[int] = (),
) -> list[str]:
    """Run what ``materialise`` makes for every rank of the axis against ``original``, and compare all results.

    Inputs: floats ``N(0, 1) * 0.1`` (1-d ``N(0, 1)``), token ids over the vocabulary, other integers 0 or 1 (good for
    any index), sizes from the token count, 2 for other symbols, None for what is no tensor. All ranks run this rank's
    constants. All ranks of all groups of the graph take part, as their rank lists say. Inputs that a graph writes are
    compared as well.

    Args:
        original: one rank's canonical graph, as it was before the rewrite; left as it is.
        graph: its placement graph, for any rank of the axis.
        interval: the plan. Its bounds do not matter: a rewritten graph is right at every token count.
        replicated: placeholder name → whether all ranks of the axis hold the same value.
        varying: symbols of sizes and numbers that differ between ranks: each rank has one more than the one before.
        seed: of the random inputs.
        token_counts: counts to run; default: the static one, or 1, n-1, n, n+1 and 2n+3, raised by a multiple of n
            where the graph's guards ask for more. Those on which the graph itself fails do not count, if it runs on
            more tokens.

    Returns:
        What differs, one line each with token count, rank and output, or what kept the graphs from running (for
        collectives that do not match, the ranks and nodes). Empty: equal on all ranks.

    Raises:
        PlanError: the plan does not fit the graph.
    """
    with _disable_current_modes(), torch.no_grad():
        try:
            mesh = _Mesh.of(original, graph.known.axis)
            if mesh.unknown:
                return [mesh.unknown]
            counts = sorted(set(token_counts or _default_counts(original, graph)))
            draw = _Inputs(original, graph, replicated, mesh, seed, varying)
            refusal = draw.refusal(counts[-1])
            if refusal:
                return [refusal]
            graphs = [materialise(original, _at_rank(graph, rank), interval) for rank in range(graph.known.axis.size)]
            check = _Check(original, graphs, draw, mesh)
            return check.run(counts if token_counts else [c for c in counts if check.admits(c)] or counts[-1:])
        except LockstepError as error:
            return [str(error)]


def _at_rank(graph: PlacementGraph, rank: int) -> PlacementGraph:
    return replace(graph, known=replace(graph.known, axis=replace(graph.known.axis, rank=rank)))


def _default_counts(gm: fx.GraphModule, graph: PlacementGraph) -> list[int]:
    tokens, n = graph.known.tokens, graph.known.axis.size
    assert tokens is not None
    if tokens.is_number:
        return [int(tokens)]
    least, most = _range_of(gm, tokens)
    # Torch calls 2 the least size of every symbolic dim; what asks for more is a guard of this graph.
    raised = -(-least // n) * n if least > 2 else 0
    counts = [min(c + raised, most) for c in (1, n - 1, n, n + 1, 2 * n + 3)]
    return [c for c in counts if c > 0]


def _range_of(gm: fx.GraphModule, tokens: Expr) -> tuple[int, int]:
    """The token counts that the graph's guards admit; anything where they cannot be read."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, torch.SymInt) and size.node.expr == tokens:
                bounds = size.node.shape_env.bound_sympy(tokens)
                most = int(bounds.upper) if bounds.upper.is_Integer else 2**62
                return int(bounds.lower), most
    return 0, 2**62


@dataclass(frozen=True)
class _Mesh:
    """The ranks to simulate: all that collectives of the graph and of its rewrite reach from this rank.

    Args:
        ranks: their global ranks.
        places: rank of each on its own group of the axis.
        groups: per simulated rank, every group of the graph as simulated ranks.
        unknown: why that cannot be told; empty if it can.
    """

    ranks: list[int]
    places: list[int]
    groups: list[dict[str, tuple[int, ...]]]
    unknown: str = ""

    @classmethod
    def of(cls, gm: fx.GraphModule, axis: Axis) -> _Mesh:
        calls = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in RULES]
        names = [axis.group_name, *(str(bind(n.target, n.args, n.kwargs)["group_name"]) for n in calls)]
        found: dict[int, dict[str, tuple[int, ...]]] = {}
        pending = [axis.me]
        while pending:
            rank = pending.pop()
            if rank in found:
                continue
            found[rank] = {}
            for name in dict.fromkeys(names):
                members = axis.members(name, rank)
                if members is None:
                    why = f"it is not known which ranks run group {name!r} with rank {rank}: use verify='static'"
                    return cls([], [], [], why)
                found[rank][name] = members
                pending += members
        ranks = sorted(found)
        number = {rank: index for index, rank in enumerate(ranks)}
        groups = [{name: tuple(number[r] for r in m) for name, m in found[rank].items()} for rank in ranks]
        return cls(ranks, [found[rank][axis.group_name].index(rank) for rank in ranks], groups)

    def sharing(self, name: str, index: int) -> int:
        """The first of the ranks that share what is the same all over the axis with this one."""
        return self.ranks[min(self.groups[index][name])]


class _Inputs:
    """Random inputs for every simulated rank."""

    def __init__(
        self,
        gm: fx.GraphModule,
        graph: PlacementGraph,
        replicated: Callable[[str], bool],
        mesh: _Mesh,
        seed: int,
        varying: Collection[sympy.Basic] = (),
    ) -> None:
        self.nodes = gm.graph.find_nodes(op="placeholder")
        self.tokens, self.size = graph.known.tokens, graph.known.axis.size
        self.axis = graph.known.axis.group_name
        self.varying = {*varying, *(s for node in self.nodes if not replicated(node.name) for s in _symbol(node))}
        self.replicated, self.mesh, self.seed = replicated, mesh, seed
        self.below = _vocabulary(gm, self.size, replicated)

    def refusal(self, tokens: int) -> str:
        """Why inputs for ``tokens`` tokens cannot be made; empty if they can."""
        needed = 0
        for node in self.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                if value.device.type == "meta":
                    return f"input {node.name!r} is on the meta device, which computes nothing: use verify='static'"
                width = max(value.element_size(), wide(value.dtype).itemsize)
                needed += math.prod(self.sizes(value.shape, tokens)) * width * len(self.mesh.ranks)
        if needed <= MOST_BYTES:
            return ""
        return (
            f"the inputs of {len(self.mesh.ranks)} ranks take {needed / 2**30:.1f} GiB in float64, more than "
            f"{MOST_BYTES / 2**30:g} GiB: use verify='static' for a model of this size"
        )

    def draw(self, tokens: int) -> list[list[object]]:
        """One list of inputs per simulated rank, in the graph's dtypes."""
        return [self._draw_rank(rank, tokens) for rank in range(len(self.mesh.ranks))]

    def _draw_rank(self, rank: int, tokens: int) -> list[object]:
        values: list[object] = []
        for index, node in enumerate(self.nodes):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                # Replicated over the axis: the same for the ranks of one group of the axis, and of that only.
                shared = self.replicated(node.name)
                where = self.mesh.sharing(self.axis, rank) if shared else self.mesh.ranks[rank]
                seed = hash((self.seed, tokens, index, shared, where)) & (2**63 - 1)
                generator = torch.Generator().manual_seed(seed)
                values.append(self._draw(value, tokens, rank, self.below.get(node, 2), generator))
            else:
                values.append(self.sizes([value], tokens, rank)[0] if isinstance(value, int | torch.SymInt) else None)
        return values

    def _draw(self, like: torch.Tensor, tokens: int, rank: int, below: int, generator: torch.Generator) -> torch.Tensor:
        shape, strides = self.sizes(like.shape, tokens, rank), self.sizes(like.stride(), tokens, rank)
        length = 1 + sum((s - 1) * step for s, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        scale = SCALES[len(shape) > 1]
        if like.dtype.is_complex:
            flat = torch.randn(length, dtype=torch.complex128, generator=generator) * scale
        elif like.dtype.is_floating_point:
            flat = torch.randn(length, dtype=torch.float64, generator=generator) * scale
        else:
            flat = torch.randint(below, (length,), generator=generator)
        return flat.to(like.dtype).to(like.device).as_strided(shape, strides)

    def sizes(self, sizes: Sequence[object], tokens: int, rank: int = 0) -> list[int]:
        """``sizes`` at ``tokens`` tokens on a simulated rank."""
        assert self.tokens is not None
        # A token count that is no plain symbol cannot be asked for: every symbol in it is as large as asked.
        counted = {symbol: sympy.Integer(tokens) for symbol in self.tokens.free_symbols}
        found = []
        for expr in map(size_expr, sizes):
            small = {s: sympy.Integer(SMALL + rank * (s in self.varying)) for s in expr.free_symbols}
            found.append(int(expr.subs({**small, **counted})))
        return found


def _symbol(node: fx.Node) -> set[sympy.Symbol]:
    """The symbols of a number among the inputs."""
    value = node.meta.get("val")
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()


def _vocabulary(gm: fx.GraphModule, size: int, replicated: Callable[[str], bool]) -> dict[fx.Node, int]:
    """How many token ids there are, for the input that a vocabulary gather reads.

    A vocabulary that is sharded over the axis holds ``rows * size`` ids, and the graph masks those that are another
    rank's; all ranks run this rank's constants, so with ids of the first shard alone other ranks would see only zeros.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        weight, root = node.args[:2]
        masked = False
        while isinstance(root, fx.Node) and root.op == "call_function" and root.all_input_nodes:
            masked = masked or op_name(root.target) not in VIEWS | CASTS
            root = root.args[0] if isinstance(root.args[0], fx.Node) else root.all_input_nodes[0]
        if isinstance(root, fx.Node) and root.op == "placeholder" and isinstance(weight, fx.Node):
            rows = weight.meta["val"].shape[0]
            if isinstance(root.meta.get("val"), torch.Tensor) and isinstance(rows, int):
                return {root: rows * size if masked and not replicated(weight.name) else rows}
    return {}


@dataclass(frozen=True)
class _Check:
    """Runs the original and every rank's rewritten graph, and compares."""

    original: fx.GraphModule
    graphs: Sequence[fx.GraphModule]
    draw: _Inputs
    mesh: _Mesh

    def admits(self, tokens: int) -> bool:
        """Whether the original's results at ``tokens`` have the shapes that it was traced with.

        A trace takes every symbolic size to be 2 at least, so it may say of two last rows that there are two.
        """
        if tokens > 1:
            return True
        try:
            found = self._run([self.original] * len(self.graphs), tokens, exact=False)[0]
        except LockstepError:
            return False
        said = [n.meta["val"].shape for n in _results(self.original)]
        real = [list(v.shape) for v in found.values() if isinstance(v, torch.Tensor)]
        return all(self.draw.sizes(shape, tokens) == shown for shape, shown in zip(said, real, strict=False))

    def run(self, counts: Sequence[int]) -> list[str]:
        exact = self._has_wide_form(counts[0])
        if exact:
            wide_form = replace(self, original=widened(self.original), graphs=list(map(widened, self.graphs)))
            failures, _ = self._compare(counts[-1:], None, exact=False)
            found, told = wide_form._compare(counts, tolerance(torch.float64), exact=True)
            failures += found
        else:
            failures, told = self._compare(counts, tolerance(self._coarsest()), exact=False)
        if not told and not failures:
            return [f"every output is zero on random inputs of {counts} tokens: use verify='static'"]
        return failures

    def _coarsest(self) -> torch.dtype:
        values = (leaf for node in self.original.graph.nodes for leaf in tree_leaves(node.meta.get("val")))
        dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex())}
        return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float64)

    def _has_wide_form(self, tokens: int) -> bool:
        try:
            self._run([widened(self.original)] * len(self.graphs), tokens, exact=True)
        except LockstepError:
            return False
        return True

    def _compare(self, counts: Sequence[int], bound: float | None, *, exact: bool) -> tuple[list[str], bool]:
        """Failures at all ``counts``, and whether anything was not zero. No ``bound``: shapes and dtypes only."""
        failures: list[str] = []
        unrun: list[str] = []
        told = False
        for tokens in counts:
            try:
                expected = self._run([self.original] * len(self.graphs), tokens, exact=exact)
            except LockstepError as error:
                unrun.append(f"T={tokens}: the original graph fails on random inputs, use verify='static': {error}")
                continue
            unrun.clear()  # a graph that reads its third row fails on two, and need not have a guard that says so
            try:
                found = self._run(self.graphs, tokens, exact=exact)
            except LockstepError as error:
                failures.append(f"T={tokens}: {error}")
                continue
            for rank, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
                told = told or any(isinstance(v, torch.Tensor) and bool(v.ne(0).any()) for v in mine.values())
                failures += [f"T={tokens}: rank {rank}: {line}" for line in _differences(mine, theirs, bound)]
        return unrun + failures, told

    def _run(self, graphs: Sequence[fx.GraphModule], tokens: int, *, exact: bool) -> list[dict[str, object]]:
        """Every result of every simulated rank, by what to call it: outputs, and inputs as the graph left them."""
        inputs = self.draw.draw(tokens)
        if exact:
            inputs = [[v.to(wide(v.dtype)) if isinstance(v, torch.Tensor) else v for v in values] for values in inputs]
        programs = [
            RankProgram(graphs[place], values, groups)
            for place, groups, values in zip(self.mesh.places, self.mesh.groups, inputs, strict=True)
        ]
        results = []
        for output, values in zip(run_lockstep(programs), inputs, strict=True):
            named = {f"output {i}": leaf for i, leaf in enumerate(tree_leaves(output))}
            results.append({**named, **self._written(values)})
        return results

    def _written(self, values: Sequence[object]) -> dict[str, object]:
        targets = (node.target for node in self.original.graph.nodes)
        if not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets):
            return {}
        return {f"input {n.name}": v for n, v in zip(self.draw.nodes, values, strict=True)}


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    """The tensors that ``gm`` returns."""
    values = tree_leaves(gm.graph.output_node().args[0])
    return [n for n in values if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]


def _differences(expected: Mapping[str, object], found: Mapping[str, object], bound: float | None) -> list[str]:
    if expected.keys() != found.keys():
        return [f"expected {len(expected)} results, found {len(found)}"]
    differences = ((name, _difference(value, found[name], bound)) for name, value in expected.items())
    return [f"{name}: {line}" for name, line in differences if line]


def _difference(a: object, b: object, bound: float | None) -> str:
    """How ``b`` differs from ``a``; empty if it does not."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return "" if type(a) is type(b) and a == b else f"expected {a!r}, found {b!r}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"expected {a.dtype} {list(a.shape)}, found {b.dtype} {list(b.shape)}"
    if bound is None:
        return ""
    if not (a.is_floating_point() or a.is_complex()):
        wrong = int(a.ne(b).sum())
        return f"{wrong} of {a.numel()} elements differ" if wrong else ""
    a, b = a.to(wide(a.dtype)), b.to(wide(b.dtype))
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
        return "NaN or infinite in other places"
    size, error = float(a[finite].norm()), float((a[finite] - b[finite]).norm())
    if error <= bound * size:
        return ""
    return f"relative error {error / size if size else math.inf:.1e}, tolerance {bound:.1e}"
