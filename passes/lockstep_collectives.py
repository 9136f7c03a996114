"""What each functional collective computes when the operands of all its ranks are at hand, and what it asks of them.

The table raises nothing itself: ``fits`` returns the reason why an operand cannot take part. A collective that is not
in the table is refused by ``refusal``, because run on one rank alone it would be silently wrong, or hang.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

Arguments = Mapping[str, Any]
"""The arguments of a collective by their schema names, without the operands and the group."""

_C10D = torch.ops._c10d_functional
_WAIT = _C10D.wait_tensor.default
ALL_TO_ALL = _C10D.all_to_all_single.default
_NAMESPACES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d"})

REDUCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def _fits_always(tensor: Tensor, n: int, arguments: Arguments) -> str | None:
    return None


def _fits_gather(tensor: Tensor, n: int, arguments: Arguments) -> str | None:
    return None if tensor.dim() else "expected a tensor with a dim 0, found a scalar tensor"


def _fits_scatter(tensor: Tensor, n: int, arguments: Arguments) -> str | None:
    # torch's fake reduce-scatter floor-divides here and drops rows; gloo aborts the process.
    if tensor.dim() and tensor.shape[0] % n == 0:
        return None
    return f"expected dim 0 divisible by the group size {n}, found shape {list(tensor.shape)}; pad it first"


def _fits_broadcast(tensor: Tensor, n: int, arguments: Arguments) -> str | None:
    src = arguments["src"]
    return None if 0 <= src < n else f"expected src as a rank within the group, 0 to {n - 1}, found {src}"


def _fits_all_to_all(tensor: Tensor, n: int, arguments: Arguments) -> str | None:
    for name in ("output_split_sizes", "input_split_sizes"):
        if len(arguments[name]) != n:
            return f"expected {n} {name}, one per rank of the group, found {list(arguments[name])}"
    splits = list(arguments["input_split_sizes"])
    if tensor.dim() and min(splits) >= 0 and sum(splits) == tensor.shape[0]:
        return None
    return f"expected input_split_sizes that add up to dim 0, found {splits} for shape {list(tensor.shape)}"


def _copies(values: Iterable[Tensor]) -> list[Tensor]:
    """Own, contiguous memory for each rank, as on real ranks: a later in-place op must not be seen by another rank."""
    return [value.clone(memory_format=torch.contiguous_format) for value in values]


def _reduce(shards: Sequence[Tensor], reduce_op: str) -> Tensor:
    total = functools.reduce(REDUCTIONS[reduce_op], shards)
    # div_ refuses integers, as gloo does; on a copy: the total of a group of one is the operand itself.
    return total.clone().div_(len(shards)) if reduce_op == "avg" else total


def _all_reduce(shards: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Tensor]:
    return _copies([_reduce(shards, arguments[0]["reduce_op"])] * len(shards))


def _reduce_scatter(shards: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Tensor]:
    return _copies(_reduce(shards, arguments[0]["reduce_op"]).tensor_split(len(shards)))


def _all_gather(shards: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Tensor]:
    return _copies([torch.cat(list(shards))] * len(shards))


def _broadcast(shards: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Tensor]:
    return _copies([shards[arguments[0]["src"]]] * len(shards))


def _all_to_all(shards: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Tensor]:
    sent = [shard.split(list(own["input_split_sizes"])) for shard, own in zip(shards, arguments, strict=True)]
    return _copies(torch.cat(received) for received in zip(*sent, strict=True))


@dataclass(frozen=True)
class CollectiveRule:
    """How one collective runs in one process.

    Args:
        fits: ``(operand, group size, arguments)`` of one rank to the reason why it cannot take part, or None.
        perform: one operand and the arguments of every rank, in group order, to every rank's result.
    """

    fits: Callable[[Tensor, int, Arguments], str | None]
    perform: Callable[[Sequence[Tensor], Sequence[Arguments]], list[Tensor]]


RULES: Mapping[Any, CollectiveRule] = {
    _C10D.all_reduce.default: CollectiveRule(_fits_always, _all_reduce),
    _C10D.all_reduce_coalesced.default: CollectiveRule(_fits_always, _all_reduce),
    _C10D.reduce_scatter_tensor.default: CollectiveRule(_fits_scatter, _reduce_scatter),
    _C10D.reduce_scatter_tensor_coalesced.default: CollectiveRule(_fits_scatter, _reduce_scatter),
    _C10D.all_gather_into_tensor.default: CollectiveRule(_fits_gather, _all_gather),
    _C10D.all_gather_into_tensor_coalesced.default: CollectiveRule(_fits_gather, _all_gather),
    ALL_TO_ALL: CollectiveRule(_fits_all_to_all, _all_to_all),
    _C10D.broadcast.default: CollectiveRule(_fits_broadcast, _broadcast),
}


def kind_of(target: OpOverload) -> str:
    """The collective's name without namespace and overload, such as ``"all_reduce"``."""
    return str(target).split(".")[1]


def bind(target: OpOverload, args: Sequence[Any], kwargs: Arguments) -> dict[str, Any]:
    """Map positional and keyword arguments of ``target`` to its schema's names."""
    names = [argument.name for argument in target._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def facets_of(target: OpOverload, operands: Sequence[Tensor], arguments: Arguments) -> list[tuple[str, object]]:
    """What must agree over the group, by name, in the order in which a difference is worth reporting."""
    # An all-to-all may send and receive any number of rows: split_conflict compares those.
    free = 1 if target is ALL_TO_ALL else 0
    shapes = [", ".join(["*"] * free + [str(size) for size in operand.shape[free:]]) for operand in operands]
    dtypes = [str(operand.dtype).removeprefix("torch.") for operand in operands]
    layouts = [f"{dtype} [{shape}]" for dtype, shape in zip(dtypes, shapes, strict=True)]
    return [
        ("kind", kind_of(target)),
        ("reduce_op", arguments.get("reduce_op")),
        ("src", arguments.get("src")),
        ("operands", ", ".join(layouts)),
    ]


def split_conflict(arguments: Sequence[Arguments]) -> tuple[int, int] | None:
    """The first ``(sender, receiver)``, as ranks within the group, whose all-to-all splits differ, or None."""
    if "input_split_sizes" not in arguments[0]:
        return None
    for i, sender in enumerate(arguments):
        for j, receiver in enumerate(arguments):
            if sender["input_split_sizes"][j] != receiver["output_split_sizes"][i]:
                return i, j
    return None


@functools.cache
def _communicates(target: object) -> bool:
    """Judge ``target`` by its namespace, by a process group among its schema's arguments, or by its Python module."""
    if isinstance(target, OpOverloadPacket):
        return any(_communicates(getattr(target, overload)) for overload in target.overloads())
    if not isinstance(target, OpOverload):
        return str(getattr(target, "__module__", "")).startswith("torch.distributed")
    return target.namespace in _NAMESPACES or any(
        argument.name == "hcom" or (argument.name.startswith("group") and str(argument.type) in ("str", "Any"))
        for argument in target._schema.arguments
    )


def _collectives_of(node: fx.Node) -> list[Any]:
    if node.op != "call_function":
        return []
    # auto_functionalized_v2 has the operator that it runs among its arguments.
    operators = [arg for arg in node.args if isinstance(arg, (OpOverload, OpOverloadPacket))]
    return [target for target in (node.target, *operators) if target is not _WAIT and _communicates(target)]


def refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Why ``node`` of ``gm`` cannot be run rank by rank, or None.

    A collective that is hidden in an operator without a process-group argument cannot be seen.
    """
    if node.op in ("call_method", "call_module"):
        return f"is a {node.op}; expected a functional ATen graph, capture one with AOTAutograd"
    if node.op == "get_attr":
        value: object = functools.reduce(getattr, str(node.target).split("."), gm)
        inner = value.modules() if isinstance(value, fx.GraphModule) else ()
        if any(map(_collectives_of, (n for m in inner if isinstance(m, fx.GraphModule) for n in m.graph.nodes))):
            return "is a subgraph with collectives; inline it first"
    found = [] if node.target in RULES else _collectives_of(node)
    return f"is the unknown collective {found[0]}; canonicalise the graph first" if found else None
