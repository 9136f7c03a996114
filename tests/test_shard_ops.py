"""Shards on 2 to 8 ranks in lockstep: any token count, any place of the tokens; and the declared shapes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import sympy
import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cpcompile.axes import Axis
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.shard_ops import ShardEmitter, local_shape
from cpcompile.passes.token_layout import TokenDim, shape_of, size_expr

B, H, K, D = 2, 5, 3, 4
TP = "tp"
EXAMPLE = 7  # token count of the trace


@dataclass(frozen=True)
class Case:
    """A value's shape as a function of T, where its tokens lie, and the dims that are transposed in memory."""

    name: str
    shape: Callable[[int | torch.SymInt], tuple[int | torch.SymInt, ...]]
    layout: TokenDim
    swapped: tuple[int, int] | None = None

    def allocate(self, tokens: int | torch.SymInt, dtype: torch.dtype) -> Tensor:
        """An empty value, strided as the case says."""
        shape = list(self.shape(tokens))
        if self.swapped is None:
            return torch.empty(shape, dtype=dtype)
        a, b = self.swapped
        shape[a], shape[b] = shape[b], shape[a]
        return torch.empty(shape, dtype=dtype).transpose(a, b)

    def data(self, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        value = self.allocate(tokens, dtype)
        return value.copy_(torch.randint(-8, 8, value.shape, generator=g) + torch.rand(value.shape, generator=g))


def at(dim: int, outer: int = 1, inner: int = 1) -> TokenDim:
    return TokenDim(dim, sympy.Integer(outer), sympy.Integer(inner))


CASES = [
    Case("[T, H]", lambda t: (t, H), at(0)),
    Case("[1, T, H]", lambda t: (1, t, H), at(1)),
    Case("[B, T, H]", lambda t: (B, t, H), at(1)),
    Case("[B, 1, T, d]", lambda t: (B, 1, t, D), at(2)),
    Case("[B, h, T, d] of [B, T, h, d]", lambda t: (B, K, t, D), at(2), (1, 2)),
    Case("[H, T] of [T, H]", lambda t: (H, t), at(1), (0, 1)),
    Case("[T, H] of [H, T]", lambda t: (t, H), at(0), (0, 1)),
    Case("[B*T, H]", lambda t: (B * t, H), at(0, B)),
    Case("[B*T*k]", lambda t: (B * t * K,), at(0, B, K)),
    Case("[T*k, H]", lambda t: (t * K, H), at(0, 1, K)),
]
BY_NAME = {case.name: case for case in CASES}
# Values that one gather can carry together: the same leading rows, other widths.
FUSED = {
    "[T, H]": "[T*k, H]",
    "[B, T, H]": "[B, 1, T, d]",
    "[B*T, H]": "[B*T*k]",
    "[H, T] of [T, H]": "[H, T] of [T, H]",
}


@dataclass(frozen=True)
class Built:
    """One rank's graph: scatter, own rows, and their gathers, of ``x`` and of ``x`` and ``y`` together."""

    gm: fx.GraphModule
    emitter: ShardEmitter
    tokens: sympy.Expr


def build(case: Case, n: int, rank: int, dtype: torch.dtype, static: int | None = None, sizes: str = "symint") -> Built:
    """``sizes``: T arrives as a ``"symint"`` input, or as a size of a ``"tensor"`` input."""
    mode, tokens, hints = FakeTensorMode(shape_env=ShapeEnv()), static, {}
    other = BY_NAME[FUSED.get(case.name, case.name)]
    if static is None:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        ids = mode.from_tensor(torch.empty(EXAMPLE), symbolic_context=context)
        tokens, hints = ids.shape[0], {size_expr(ids.shape[0]): EXAMPLE}
    graph = fx.Graph()
    count = graph.placeholder("t")
    with mode:
        count.meta["val"] = tokens if sizes == "symint" else ids
        likes = [case.allocate(tokens, dtype), other.allocate(tokens, dtype)]  # type: ignore[arg-type]
    nodes = [graph.placeholder(name) for name in "xy"]
    emitter = ShardEmitter(graph, Axis("tp", TP, n, rank, tuple(range(n))), size_expr(tokens), mode, hints)
    for node, value in zip([count, *nodes], [count.meta["val"], *likes], strict=True):
        node.meta["val"] = value
        emitter.bind(node)
    x, y = ((node, like, shape_of(like), c.layout) for node, like, c in zip(nodes, likes, (case, other), strict=True))
    scattered, mine, other_mine = emitter.scatter(*x), emitter.own_rows(*x), emitter.own_rows(*y)
    (summed,), (whole,) = emitter.gather([(scattered, *x[1:])]), emitter.gather([(mine, *x[1:])])
    both = emitter.gather([(scattered, *x[1:]), (other_mine, *y[1:])])
    graph.output((scattered, mine, summed, whole, *both, emitter.all_reduce(*x[:3])))
    graph.lint()
    return Built(fx.GraphModule(torch.nn.Module(), graph), emitter, size_expr(tokens))


@functools.cache
def symbolic(name: str, n: int, dtype: torch.dtype) -> list[Built]:
    return [build(BY_NAME[name], n, rank, dtype) for rank in range(n)]


def rows_of(value: Tensor, layout: TokenDim, tokens: int, n: int, rank: int) -> Tensor:
    """The rank's rows, by indexing and zero filling: ``[pre, T, post]`` in blocks of ``ceil(T/n)``."""
    local = -(-tokens // n)
    head, tail = value.shape[: layout.dim], value.shape[layout.dim + 1 :]
    outer, inner = int(layout.outer), int(layout.inner)
    parted = value.reshape(*head, outer, tokens, inner, *tail).movedim(layout.dim + 1, 0)
    mine = torch.zeros(local, *parted.shape[1:], dtype=value.dtype)
    owned = parted[rank * local : (rank + 1) * local]
    mine[: len(owned)] = owned
    return mine.movedim(0, layout.dim + 1).reshape(*head, outer * local * inner, *tail)


def check(case: Case, programs: list[Built], tokens: int, dtype: torch.dtype, count: Callable[[int], object]) -> None:
    """Run all ranks on partial sums ``x`` and a common ``y``, and compare with whole tensors."""
    n = len(programs)
    xs = [case.data(tokens, dtype, seed) for seed in range(n)]
    y = BY_NAME[FUSED.get(case.name, case.name)].data(tokens, dtype, 100)
    groups = {TP: tuple(range(n))}
    outputs = run_lockstep(
        [RankProgram(p.gm, [count(tokens), x, y], groups) for p, x in zip(programs, xs, strict=True)]
    )
    total = functools.reduce(operator.add, xs)
    # Every rank puts its own rows of its own x into the gather.
    mixed = rows_of_whole([rows_of(x, case.layout, tokens, n, r) for r, x in enumerate(xs)], case, tokens)
    for rank, (scattered, mine, summed, whole, fused_x, fused_y, reduced) in enumerate(outputs):  # type: ignore[misc]
        assert torch.equal(scattered, rows_of(total, case.layout, tokens, n, rank))
        assert torch.equal(mine, rows_of(xs[rank], case.layout, tokens, n, rank))
        for got, want in ((summed, total), (fused_x, total), (reduced, total), (whole, mixed), (fused_y, y)):
            assert got.shape == want.shape and got.dtype == dtype
            assert torch.equal(got, want)


def rows_of_whole(shards: list[Tensor], case: Case, tokens: int) -> Tensor:
    """Join every rank's rows and drop the pad rows."""
    layout, outer, inner = case.layout, int(case.layout.outer), int(case.layout.inner)
    parted = [
        s.reshape(*s.shape[: layout.dim], outer, -1 if s.numel() else 0, inner, *s.shape[layout.dim + 1 :])
        for s in shards
    ]
    whole = torch.cat(parted, layout.dim + 1).narrow(layout.dim + 1, 0, tokens)
    return whole.reshape(case.shape(tokens))  # type: ignore[arg-type]


# Numbers


@pytest.mark.parametrize(
    ("name", "n"), [(name, n) for name in BY_NAME for n in (2, 3, 4)] + [("[T, H]", 8), ("[B*T*k]", 8)]
)
def test_any_token_count(name: str, n: int) -> None:
    programs = symbolic(name, n, torch.float32)
    edges = {t for k in (0, 1, 2, 4) for t in (k * n - 1, k * n, k * n + 1) if t >= 0}
    for tokens in range(4 * n + 2) if n < 8 else sorted(edges):
        check(BY_NAME[name], programs, tokens, torch.float32, int)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_any_dtype(name: str, dtype: torch.dtype) -> None:
    n = 3
    programs = symbolic(name, n, dtype)
    for tokens in (0, 1, n, n + 1, 4 * n):
        check(BY_NAME[name], programs, tokens, dtype, int)


@pytest.mark.parametrize("tokens", [1, 6, 7])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_static_token_count(name: str, tokens: int) -> None:
    n = 3
    programs = [build(BY_NAME[name], n, rank, torch.float32, static=tokens) for rank in range(n)]
    check(BY_NAME[name], programs, tokens, torch.float32, int)


@pytest.mark.parametrize("name", FUSED)
def test_the_token_count_of_a_tensor_input(name: str) -> None:
    programs = [build(BY_NAME[name], 2, rank, torch.float32, sizes="tensor") for rank in range(2)]
    for tokens in (0, 1, 5, 6):
        check(BY_NAME[name], programs, tokens, torch.float32, torch.empty)


@pytest.mark.parametrize("tokens", [6, 7])
def test_a_shard_that_is_transposed_in_memory(tokens: int) -> None:
    """The rewrite transposes the shard where the model transposed the whole: a gather finds it strided."""
    n, programs = 3, []
    for rank in range(n):
        mode, graph = FakeTensorMode(shape_env=ShapeEnv()), fx.Graph()
        x = graph.placeholder("x")
        with mode:
            like = torch.empty(B, tokens, K, D)
            turned = like.transpose(1, 2)
        emitter = ShardEmitter(graph, Axis("tp", TP, n, rank, tuple(range(n))), sympy.Integer(tokens), mode, {})
        mine = emitter.own_rows(x, like, shape_of(like), at(1))
        mine = graph.call_function(torch.ops.aten.transpose.int, (mine, 1, 2))
        graph.output(emitter.gather([(mine, turned, shape_of(turned), at(2))])[0])
        programs.append(fx.GraphModule(torch.nn.Module(), graph))
    data = torch.randn(B, tokens, K, D, generator=torch.Generator().manual_seed(0))
    for whole in run_lockstep([RankProgram(gm, [data], {TP: tuple(range(n))}) for gm in programs]):
        assert isinstance(whole, Tensor) and torch.equal(whole, data.transpose(1, 2))


# Declared shapes


class Recompute(fx.Interpreter):
    """Runs a graph on fake tensors and compares each result with what the node declares."""

    def __init__(self, built: Built, tokens: int, n: int) -> None:
        super().__init__(built.gm)
        self.at = {built.tokens: tokens}
        self.n, self.compared = n, 0

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op == "call_function":
            declared = n.meta["val"]
            pairs = zip(declared, result, strict=True) if isinstance(declared, list | tuple) else [(declared, result)]
            for said, got in pairs:
                self.compare(n, said, got)
            if "reduce_scatter" in str(n.target):
                # The fake kernel divides and rounds down in silence.
                assert self.fetch_args_kwargs_from_env(n)[0][0].shape[0] % self.n == 0
        return result

    def value(self, size: object) -> int:
        return int(size_expr(size).subs(self.at))

    def compare(self, n: fx.Node, said: object, got: object) -> None:
        self.compared += 1
        if not isinstance(got, Tensor):
            assert self.value(said) == got, n
            return
        assert isinstance(said, FakeTensor) and isinstance(got, FakeTensor)
        assert tuple(map(self.value, said.shape)) == tuple(got.shape), n
        assert (said.dtype, said.device) == (got.dtype, got.device)
        strides = zip(got.shape, map(self.value, said.stride()), got.stride(), strict=True)
        if got.numel() and any(size != 1 and a != b for size, a, b in strides):
            # A strided result that is declared row-major: fit for nothing but to be made so at once.
            assert all(u.target in (operator.getitem, torch.ops.aten.clone.default) for u in n.users), n


def fake_inputs(built: Built, name: str, tokens: int) -> Iterator[object]:
    yield tokens
    for case in (BY_NAME[name], BY_NAME[FUSED.get(name, name)]):
        yield case.allocate(tokens, torch.float32)


@pytest.mark.parametrize(("tokens", "static"), [(5, False), (5, True), (8, True)])
@pytest.mark.parametrize("name", BY_NAME)
def test_declared_values_are_what_the_ops_return(name: str, tokens: int, static: bool) -> None:
    n = 4
    built = build(BY_NAME[name], n, 1, torch.float32, static=tokens if static else None)
    run = Recompute(built, tokens, n)
    with FakeTensorMode():
        run.run(*fake_inputs(built, name, tokens))
    assert run.compared > 20


def test_no_guard_is_added() -> None:
    for name in FUSED:
        built = build(BY_NAME[name], 4, 1, torch.float32)
        env = built.emitter._shape_env
        assert env is not None and not env.guards


def test_without_a_fake_mode_nodes_declare_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    emitter = ShardEmitter(graph, Axis("tp", TP, 2, 0, (0, 1)), sympy.Integer(5), None, {})
    like = torch.empty(5, H)
    mine = emitter.own_rows(x, like, shape_of(like), at(0))
    assert mine.meta["val"] is None
    graph.output(mine)
    assert fx.GraphModule(torch.nn.Module(), graph)(torch.ones(5, H)).shape == (3, H)


# What is emitted


def targets(built: Built) -> list[str]:
    return [str(node.target) for node in built.gm.graph.nodes if node.op == "call_function"]


def test_no_padding_where_t_divides() -> None:
    assert "aten.constant_pad_nd.default" not in targets(build(BY_NAME["[T, H]"], 4, 1, torch.float32, static=8))
    assert "aten.constant_pad_nd.default" in targets(build(BY_NAME["[T, H]"], 4, 1, torch.float32, static=7))


def test_padding_is_minimal() -> None:
    built = build(BY_NAME["[T, H]"], 8, 0, torch.float32, static=17)
    assert built.emitter.padded == 24


def test_several_values_are_gathered_once() -> None:
    found = targets(build(BY_NAME["[T, H]"], 4, 1, torch.float32))
    assert found.count("_c10d_functional.all_gather_into_tensor.default") == 3  # x summed, x own, x and y together
    assert found.count("_c10d_functional.reduce_scatter_tensor.default") == 1


def test_sizes_are_computed_once() -> None:
    built = build(BY_NAME["[T, H]"], 4, 1, torch.float32)
    seen = [
        (n.target, n.args) for n in built.gm.graph.nodes if n.target in (operator.add, operator.mul, operator.floordiv)
    ]
    assert built.emitter.size(built.emitter.local) is built.emitter.size(built.emitter.local)
    assert built.emitter.size(sympy.Integer(3)) == 3
    assert seen


def test_local_shape() -> None:
    t = sympy.Symbol("t", positive=True, integer=True)
    assert local_shape((t * 6, sympy.Integer(H)), at(0, 2, 3), sympy.Integer(4)) == (24, H)


def test_strides_of_a_shard_shrink_with_the_tokens() -> None:
    """A shard of a transposed value is transposed, too: views that were possible stay possible."""
    for case, strides in (("[B, h, T, d] of [B, T, h, d]", (2 * K * D, D, K * D, 1)), ("[T, H] of [H, T]", (1, 2))):
        built = build(BY_NAME[case], 4, 0, torch.float32, static=8)
        whole = next(n for n in built.gm.graph.nodes if n.name == "x").meta["val"]
        local = built.emitter.local_fake(whole, BY_NAME[case].layout)
        assert local is not None and local.stride() == strides
