"""Stand-ins for other frameworks' collectives, by their schemas, and one process that plays all ranks of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import get_mutable_args, read_view_information_from_args

# Torch keeps no reference to a library: a fragment that is collected takes its ops along.
_LIBRARIES: list[torch.library.Library] = []


def define(namespace: str, schema: str, fake: Callable[..., Any]) -> None:
    """Register an op that can be traced; only ``run_ranks`` can run it."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(schema)
    torch.library.register_fake(f"{namespace}::{schema.partition('(')[0]}", fake, lib=library)


def _resized(tensor: Tensor, dim: int, size: Any) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_empty(shape)


define("vllm", "all_reduce(Tensor tensor, str group_name) -> Tensor", lambda x, group: torch.empty_like(x))
define(
    "vllm",
    "all_gather(Tensor tensor, int dim, int world_size, str group_name) -> Tensor",
    lambda x, dim, n, group: _resized(x, dim, x.shape[dim] * n),
)
define(
    "vllm",
    "reduce_scatter(Tensor tensor, int dim, int world_size, str group_name) -> Tensor",
    lambda x, dim, n, group: _resized(x, dim, x.shape[dim] // n),
)
define(
    "vllm", "maybe_pad_and_reduce(Tensor x, bool is_ep_comm=False) -> Tensor", lambda x, ep=False: torch.empty_like(x)
)
define(
    "sglang",
    "outplace_all_reduce(Tensor tensor, str group_name, str outplace_all_reduce_method) -> Tensor",
    lambda x, group, method: torch.empty_like(x),
)
define("sglang", "inplace_all_reduce(Tensor(a0!) tensor, str group_name) -> ()", lambda x, group: None)
for _name in ("reg_all_gather_into_tensor", "reg_reduce_scatter_tensor"):
    define("sglang", f"{_name}(Tensor(a0!) output, Tensor input, str group_name) -> ()", lambda out, x, group: None)
define(
    "sglang",
    "flashinfer_allreduce_residual_rmsnorm(Tensor x, Tensor residual, Tensor weight) -> (Tensor, Tensor)",
    lambda x, residual, weight: (torch.empty_like(x), torch.empty_like(x)),
)
define("_C", "shm_allreduce(Tensor(a!) x, str group) -> ()", lambda x, group: None)
define(
    "npu",
    "npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom, *, str reduce_op='sum') -> Tensor",
    lambda a, b, hcom, reduce_op="sum": a @ b,
)
define(
    "npu_define",
    "allreduce(Tensor x, str op, str tag, int[] ranks, int size) -> Tensor",
    lambda x, *_: torch.empty_like(x),
)


def _sum(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def _all_reduce(xs: Sequence[Tensor], op: str = "sum", *_: Any) -> list[Tensor]:
    total = _sum(xs) / (len(xs) if op == "avg" else 1)
    return [total.clone(memory_format=torch.contiguous_format) for _ in xs]


def _all_reduce_alike(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x).copy_(total) for x, total in zip(xs, _all_reduce(xs), strict=True)]


def _gather(xs: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    return [torch.cat(list(xs), dim) for _ in xs]


def _scatter(xs: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    return [part.contiguous() for part in _sum(xs).chunk(len(xs), dim)]


# What each collective returns on every rank, from every rank's first argument and one rank's other arguments.
_RANKS: dict[str, Callable[..., list[Any]]] = {
    "_c10d_functional::all_reduce": _all_reduce,
    "_c10d_functional::all_reduce_coalesced": lambda xs, op, *_: _listed(_all_reduce, xs, op),
    "_c10d_functional::all_gather_into_tensor": lambda xs, *_: _gather(xs),
    "_c10d_functional::all_gather_into_tensor_coalesced": lambda xs, *_: _listed(_gather, xs),
    "_c10d_functional::reduce_scatter_tensor": lambda xs, op, *_: _scatter(xs),
    "_c10d_functional::reduce_scatter_tensor_coalesced": lambda xs, op, *_: _listed(_scatter, xs),
    "_c10d_functional::wait_tensor": lambda xs: list(xs),
    "vllm::all_reduce": lambda xs, *_: _all_reduce_alike(xs),
    "vllm::all_gather": lambda xs, dim, *_: _gather(xs, dim),
    "vllm::reduce_scatter": lambda xs, dim, *_: _scatter(xs, dim),
    "sglang::outplace_all_reduce": lambda xs, *_: _all_reduce_alike(xs),
}

_FILLS: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "sglang::reg_all_gather_into_tensor": _gather,
    "sglang::reg_reduce_scatter_tensor": _scatter,
}


def _listed(collective: Callable[..., list[Any]], lists: Sequence[Sequence[Tensor]], *args: Any) -> list[list[Tensor]]:
    per_tensor = [collective(xs, *args) for xs in zip(*lists, strict=True)]
    return [list(rank) for rank in zip(*per_tensor, strict=True)]


def _auto_functionalized(ranks: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Torch's own reading of the views, on every rank's clones; then the op's writes."""
    op = ranks[0][0][0]
    names, types = get_mutable_args(op)
    written, inputs, outs = [], [], []
    for _, kwargs in ranks:
        rest = dict(kwargs)
        bases = [torch.clone(base) for base in rest.pop("_all_bases")]
        views = read_view_information_from_args(names, types, rest, bases)
        written.append(views[names[0]].regenerate_view(bases))
        inputs.append(rest.get("input"))
        outs.append((None, *bases))
    name = op._schema.name
    results = _FILLS[name](inputs) if name in _FILLS else _all_reduce(written)
    for target, result in zip(written, results, strict=True):
        target.copy_(result)
    return outs


def run_ranks(gm: fx.GraphModule, inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """Outputs per rank of ``gm``, run for all ranks together, node by node; ``inputs[r]`` are rank r's placeholders."""
    envs: list[dict[fx.Node, Any]] = [{} for _ in inputs]
    queues = [iter(rank) for rank in inputs]
    for node in gm.graph.nodes:
        calls = [fx.node.map_arg((node.args, node.kwargs), env.__getitem__) for env in envs]
        if node.op == "placeholder":
            values = [next(queue) for queue in queues]
        elif node.op == "output":
            return [args[0] for args, _ in calls]
        elif node.target is torch.ops.higher_order.auto_functionalized_v2:
            values = _auto_functionalized(calls)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _RANKS:
            values = _RANKS[node.target._schema.name]([args[0] for args, _ in calls], *calls[0][0][1:])
        else:
            values = [node.target(*args, **kwargs) for args, kwargs in calls]
        for env, value in zip(envs, values, strict=True):
            env[node] = value
    raise AssertionError("graph without output")
