"""Real AOTAutograd traces under a fake process group, and what must hold of every canonicalised one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dialect_ops
import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
from torch._dynamo.backends.common import aot_autograd
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.passes.base import PassResult
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.collectives import sizes, strides

RANKS = 4


@pytest.fixture(autouse=True, scope="module")
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


@dataclass
class Trace:
    """The graph that AOTAutograd hands to a compiler, and example values of its placeholders."""

    gm: fx.GraphModule
    inputs: list[Any]

    def per_rank(self) -> list[list[Any]]:
        """Inputs that differ from rank to rank; small integers, whose sums are exact in any order."""
        generator = torch.Generator().manual_seed(0)

        def value(v: Any) -> Any:
            return torch.randint(-8, 8, v.shape, generator=generator).to(v.dtype) if isinstance(v, torch.Tensor) else v

        return [[value(v) for v in self.inputs] for _ in range(RANKS)]


def trace(f: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> Trace:
    """Trace ``f`` as one graph; with ``dynamic`` dim 0 of every argument is symbolic."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    for arg in args if dynamic else ():
        torch._dynamo.mark_dynamic(arg, 0)
    # The stand-ins have no kernel: the graph is wanted, not its result.
    with torch.no_grad(), contextlib.suppress(NotImplementedError):
        torch.compile(f, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(*args)
    (gm,) = graphs
    tensors = iter(args)
    found = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    return Trace(gm, [next(tensors) if isinstance(v, torch.Tensor) else _hint(v) for v in found])


def _hint(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt) else value


def by_hand(build: Callable[..., Any], inputs: int = 1) -> fx.GraphModule:
    """A graph with ``inputs`` placeholders ``f32[4, 8]`` that returns what ``build(graph, *placeholders)`` gives."""
    graph = fx.Graph()
    with FakeTensorMode():
        nodes = [graph.placeholder(f"x{i}") for i in range(inputs)]
        for node in nodes:
            node.meta["val"] = torch.empty(4, 8)
    graph.output(build(graph, *nodes))
    return fx.GraphModule(torch.nn.Module(), graph)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


def text(gm: fx.GraphModule) -> str:
    """``name = op(args)`` per line, with the output."""
    return "\n".join(_line(node) for node in gm.graph.nodes if node.op != "placeholder")


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {', '.join(map(str, node.all_input_nodes))}"
    arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
    target = node.target
    name = (
        str(target).removesuffix(".default") if isinstance(target, OpOverload) else getattr(target, "__name__", target)
    )
    return f"{node.name} = {name}({arguments})"


def check(found: Trace, rewrites: int | None = None) -> tuple[str, PassResult]:
    """Canonicalise: the ranks' numbers and strides, the meta, the guards and a second run must be as they should.

    Returns:
        The text after, and the pass's result.
    """
    inputs = found.per_rank()
    before = dialect_ops.run_ranks(found.gm, inputs)
    mode = _fake_mode(found.gm)
    guards = list(mode.shape_env.guards) if mode.shape_env else []
    result = Canonicalise()(found.gm)
    assert guards == (list(mode.shape_env.guards) if mode.shape_env else []), "a guard was added"
    after = dialect_ops.run_ranks(found.gm, inputs)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, check_stride=True)
    _check_meta(found.gm, mode)
    assert Canonicalise()(found.gm) == PassResult(0, result.refusals), "a second run rewrote"
    if rewrites is not None:
        assert result.rewrites == rewrites
    return text(found.gm), result


def before_after(f: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> str:
    """Text before, number of rewrites, text after, where nothing is refused."""
    found = trace(f, *args, dynamic=dynamic)
    before = text(found.gm)
    after, result = check(found)
    assert result.refusals == []
    return f"{before}\n-> {result.rewrites}\n{after}"


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def _check_meta(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Every node's meta says what its op gives on fake inputs."""
    env: dict[fx.Node, Any] = {}
    wanted = fx.Graph().placeholder("wanted")
    for node in gm.graph.nodes:
        env[node] = node.meta.get("val")
        if node.op != "call_function":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        with mode:
            wanted.meta["val"] = node.target(*args, **kwargs)
        if isinstance(env[node], torch.Tensor):
            assert (sizes(node), strides(node)) == (sizes(wanted), strides(wanted)), node
            assert env[node].dtype == wanted.meta["val"].dtype, node
