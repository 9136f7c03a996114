"""Which inputs and constants of a graph are the same on every rank of a mesh axis, and how that was established."""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from inspect import signature
from itertools import zip_longest
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal, NamedTuple, cast

import sympy
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from cpcompile.axes import Axis
from cpcompile.errors import RanksDifferError
from cpcompile.exchange import Exchange, OfflineExchange
from cpcompile.passes.token_layout import size_expr
from cpcompile.weights import released_fingerprint

Kind = Literal["parameter", "buffer", "input", "other"]

# Token ids, positions, slots, lengths, masks. Narrower integers are quantised data (a cache): no contract.
_CONTRACT_DTYPES = frozenset({torch.int64, torch.int32, torch.bool})
_NUMBERS = (int, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class InputFact:
    """Whether one graph input is the same on every rank of the axis.

    Args:
        name: the input's name, as the caller gave it.
        replicated: the same on every rank. False also stands for "not known".
        source: ``dtensor``, ``declared``, ``offline declaration``, ``fingerprint``, ``integer input`` (the contract of
            the axis: every rank sees the same tokens), or ``unknown: ...`` with what the user can do.
    """

    name: str
    replicated: bool
    source: str


class GraphFacts(NamedTuple):
    """What ``exchange_facts`` found of a graph.

    Args:
        inputs: a fact for each input.
        rank_dependent: the nodes whose constants differ between ranks.
        varying: symbols of sizes and integers that differ between ranks.
    """

    inputs: list[InputFact]
    rank_dependent: frozenset[str]
    varying: frozenset[sympy.Symbol] = frozenset()


def input_facts(
    names: Sequence[str],
    values: Sequence[object],
    kinds: Sequence[Kind],
    axis: Axis,
    exchange: Exchange,
    *,
    declared: Sequence[str] = (),
    mutated: Collection[str] = (),
) -> list[InputFact]:
    """Say for each graph input whether it is the same on every rank of ``axis``. Costs one exchange.

    Sources in order: DTensor placements; ``declared``; a fingerprint compared over the ranks, for real parameters and
    buffers; the contract that int32, int64 and bool inputs and integers are the same, unless seen to differ. All else
    is not replicated.

    Args:
        names: one unique name for each input; ``declared`` and ``mutated`` speak of these.
        values: real or fake tensors, DTensors, ints, SymInts, or any other object.
        kinds: what each value is to the model.
        axis: the mesh axis over which the inputs are compared.
        exchange: the ranks of that axis.
        declared: ``fnmatch`` patterns of replicated inputs; ``!pattern`` says not replicated, and wins.
        mutated: inputs that the graph writes. Their contents at compile time (a cache of zeros) prove nothing.

    Raises:
        AxisError: a rank does not take part.
    """
    draft = _Draft.of(names, values, kinds, axis, exchange, declared, mutated)
    return draft.settle(exchange.all_gather(draft.compared, "fingerprints of the graph's inputs"))


def rank_dependent_nodes(gm: fx.GraphModule, exchange: Exchange) -> frozenset[str]:
    """Names of the nodes whose constants differ between ranks, or cannot be compared. One exchange; two if any differ.

    Offline nothing can differ, so constants computed from a rank's number are not found there.

    Raises:
        RanksDifferError: the graphs differ in more than constants, or a rank does not take part.
    """
    code = _GraphCode.of(gm)
    return code.rank_dependent(exchange.all_gather(code.digests, "digests of the graph"), exchange)


def exchange_facts(
    gm: fx.GraphModule,
    names: Sequence[str],
    values: Sequence[object],
    kinds: Sequence[Kind],
    axis: Axis,
    exchange: Exchange,
    *,
    declared: Sequence[str] = (),
    mutated: Collection[str] = (),
) -> GraphFacts:
    """``input_facts`` and ``rank_dependent_nodes`` from the same exchange; a second one only if constants differ."""
    draft, code = _Draft.of(names, values, kinds, axis, exchange, declared, mutated), _GraphCode.of(gm)
    extents = [_extents(node) for node in gm.graph.find_nodes(op="placeholder")]
    said = (draft.compared, code.digests, [_hints(sizes) for sizes in extents])
    gathered = exchange.all_gather(said, "fingerprints and digests of the graph")
    prints, digests, hints = zip(*cast(list[tuple[object, object, list[Any]]], gathered), strict=True)
    dependent = code.rank_dependent(digests, exchange)  # raises where the graphs are not alike
    facts, varying = draft.settle(prints), set[sympy.Symbol]()
    for place, (sizes, column) in enumerate(zip(extents, zip(*hints, strict=True), strict=True)):
        unlike = [size for size, found in zip(sizes, zip(*column, strict=True), strict=True) if len(set(found)) > 1]
        if unlike:
            facts[place] = InputFact(facts[place].name, False, f"{facts[place].source}: its size differs between ranks")
            varying.update(symbol for size in unlike for symbol in size_expr(size).free_symbols)
    return GraphFacts(facts, dependent, frozenset(varying))


def _extents(node: fx.Node) -> Sequence[object]:
    """The sizes of a graph input, or the number that it is."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return (value,) if isinstance(value, (int, torch.SymInt)) else ()


def _hints(sizes: Sequence[object]) -> list[int | None]:
    """Sizes as the example of this rank has them, None where it has none."""
    return [(s.node.hint if s.node.has_hint() else None) if isinstance(s, torch.SymInt) else int(s) for s in sizes]  # type: ignore[call-overload]


@dataclass(frozen=True)
class _Draft:
    """Facts as this rank alone sees them, and what they still depend on: ``compared`` by position and name."""

    facts: list[InputFact]
    compared: dict[tuple[int, str], str]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        values: Sequence[object],
        kinds: Sequence[Kind],
        axis: Axis,
        exchange: Exchange,
        declared: Sequence[str],
        mutated: Collection[str],
    ) -> _Draft:
        offline = isinstance(exchange, OfflineExchange)
        facts: list[InputFact] = []
        compared: dict[tuple[int, str], str] = {}
        for place, (name, value, kind) in enumerate(zip(names, values, kinds, strict=True)):
            fact = _told(name, value, axis, declared, offline)
            if fact is None:
                fact, evidence = _seen(name, value, kind, name in mutated, offline)
                if evidence is not None:
                    compared[place, name] = evidence
            facts.append(fact)
        return cls(facts, compared)

    def settle(self, gathered: Sequence[object]) -> list[InputFact]:
        everyone = cast(Sequence[dict[tuple[int, str], str]], gathered)
        differ = {key[0] for key, own in self.compared.items() if any(theirs.get(key) != own for theirs in everyone)}
        return [
            InputFact(fact.name, False, f"{fact.source}: differs between ranks") if place in differ else fact
            for place, fact in enumerate(self.facts)
        ]


def _told(name: str, value: object, axis: Axis, declared: Sequence[str], offline: bool) -> InputFact | None:
    """The fact that metadata or the user states, if any."""
    if isinstance(value, DTensor):
        return _dtensor_fact(name, value, axis)
    source = "offline declaration" if offline else "declared"
    if any(pattern.startswith("!") and fnmatchcase(name, pattern[1:]) for pattern in declared):
        return InputFact(name, False, source)
    return InputFact(name, True, source) if any(fnmatchcase(name, pattern) for pattern in declared) else None


def _seen(name: str, value: object, kind: Kind, mutated: bool, offline: bool) -> tuple[InputFact, str | None]:
    """The fact that the value suggests, and the evidence that must be equal on every rank for it to hold."""
    if isinstance(value, _NUMBERS):
        return InputFact(name, True, "integer input"), _integer_evidence(value)
    readable = _is_readable(value) and not mutated
    if isinstance(value, Tensor) and kind in ("parameter", "buffer"):
        if readable and not offline:
            return InputFact(name, True, "fingerprint"), released_fingerprint(value) or fingerprint(value)
    elif isinstance(value, Tensor) and kind == "input" and value.dtype in _CONTRACT_DTYPES:
        return InputFact(name, True, "integer input"), fingerprint(value) if readable else None
    return InputFact(name, False, f'unknown: declare it with replicated=["{name}"]'), None


def _integer_evidence(value: Any) -> str | None:
    # A rank's own number can come in as a symbolic integer (dynamic=True): its hint tells it from a token count.
    if isinstance(value, int):
        return repr(value)
    return repr(value.node.hint) if value.node.has_hint() else None


def _dtensor_fact(name: str, value: DTensor, axis: Axis) -> InputFact:
    """Ranks of a mesh hold the same local tensor if they differ only in mesh dims that are ``Replicate``."""
    split = [dim for dim, placement in enumerate(value.placements) if not isinstance(placement, Replicate)]
    with _disable_current_modes():
        ranks = value.device_mesh.mesh
        places = dict(zip(ranks.flatten().tolist(), torch.ones_like(ranks).nonzero().tolist(), strict=True))
    if not set(axis.ranks) <= places.keys():
        return InputFact(name, False, f"unknown: its DTensor mesh lacks ranks of axis {axis.name!r}")
    return InputFact(name, len({tuple(places[rank][dim] for dim in split) for rank in axis.ranks}) == 1, "dtensor")


# ---- fingerprints --------------------------------------------------------------------------------------------------

_CHUNK = 1 << 23  # bytes hashed at a time
# Words in one CPU operation: few enough for torch to stay in one thread. With more it starts its threads for each
# operation, which on a host whose cores are busy (every rank compiles) was 50 times slower.
_CPU_BLOCK = 1 << 14
_LOW_HALF = 0xFFFFFFFF


def _is_readable(value: object) -> bool:
    """Whether ``value`` is a plain tensor with contents."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value):
        return False
    return not value.is_meta and not value.is_quantized and value.layout == torch.strided


@cache
def _keys(device: torch.device, size: int) -> Tensor:
    """Fixed random words, int64 ``[size / 8 + 1]``, the same on every rank, device and version of torch."""
    return torch.frombuffer(bytearray(hashlib.shake_256(b"cpcompile").digest(size + 8)), dtype=torch.int64).to(device)


def fingerprint(tensor: Tensor) -> str:
    """Digest of shape, dtype and bits, whatever the strides and the device; computed where the tensor lies.

    Each word ``w`` meets two random keys: the sums of ``low(w + key) * high(w + key)`` mod 2**64 are read
    back and hashed (NH of Black et al., UMAC, 1999: contents that differ agree in both sums with a chance of 2**-64).
    """
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
        sums = [s for words in _chunks(tensor.detach()) for s in _sums(words, _keys(tensor.device, _CHUNK))]
        read = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(repr((tuple(tensor.shape), tensor.dtype, read)).encode()).hexdigest()


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    """The contents as int64 words, ``_CHUNK`` bytes at a time; only rows of dim 0 are ever copied."""
    if tensor.numel() == 0:
        return
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    row_bytes = tensor.element_size() * tensor.numel() // tensor.shape[0]
    for rows in tensor.split(max(1, _CHUNK // row_bytes)):
        # as_strided, for a lone element keeps any stride through contiguous() and view(-1).
        content = rows.contiguous().as_strided((rows.numel(),), (1,)).view(torch.uint8)
        if content.numel() % 8 or content.storage_offset() % 8 or content.data_ptr() % 8:
            padded = content.new_zeros(-(-content.numel() // 8) * 8)
            padded[: content.numel()] = content
            content = padded
        yield from content.view(torch.int64).split(_CHUNK // 8)


def _sums(words: Tensor, keys: Tensor) -> Iterable[Tensor]:
    block = _CPU_BLOCK if words.device.type == "cpu" else words.numel()
    for shift in (0, 1):
        pairs = zip(words.split(block), keys[shift : shift + words.numel()].split(block), strict=True)
        yield torch.stack([_product_sum(some_words + some_keys) for some_words, some_keys in pairs]).sum()


def _product_sum(keyed: Tensor) -> Tensor:
    return (keyed & _LOW_HALF).mul_(keyed >> 32).sum()


# ---- structure and constants of a graph ----------------------------------------------------------------------------

# Arguments that name a process group: they may differ between ranks that do the same.
_GROUP_ARGUMENTS = frozenset(
    {"group", "group_name", "tag", "ranks", "hcom", "group_ep", "group_tp", "comm_group", "mesh"}
)
_GROUP = "group"
_OPAQUE = "<opaque>"  # contents unknown: never claimed to be the same
_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.layout, torch.memory_format, Enum)
_CALLABLE = (OpOverload, OpOverloadPacket, HigherOrderOperator, FunctionType, BuiltinFunctionType, type)


def graph_signature(gm: fx.GraphModule) -> list[str]:
    """One string for each node, ``structure | constants``, with nodes by number; groups and device numbers left out."""
    code = _GraphCode.of(gm)
    return [f"{structure} | {constants}" for structure, constants in zip(code.structures, code.constants, strict=True)]


@dataclass(frozen=True)
class _GraphCode:
    names: list[str]
    structures: list[str]
    constants: list[str]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> _GraphCode:
        numbers: dict[fx.Node, str] = {}
        structures, constants = [], []
        for number, node in enumerate(gm.graph.nodes):
            found: list[str] = []
            structures.append(_structure(gm, node, numbers, found))
            constants.append(",".join(found))
            numbers[node] = f"%{number}"
        return cls([node.name for node in numbers], structures, constants)

    @property
    def digests(self) -> tuple[str, str]:
        return _digest(self.structures), _digest(self.constants)

    def rank_dependent(self, digests: Sequence[object], exchange: Exchange) -> frozenset[str]:
        # Every rank takes the same branch here, for all of them hold the same digests.
        everyone = cast(Sequence[tuple[str, str]], digests)
        dependent = {name for name, constants in zip(self.names, self.constants, strict=True) if _OPAQUE in constants}
        if len({structure for structure, _ in everyone}) > 1:
            self._raise_difference(exchange.all_gather(self.structures, "structure of the graph"))
        if len(set(everyone)) > 1:
            short = [hashlib.sha256(constants.encode()).digest()[:8] for constants in self.constants]
            columns = zip(*cast(list[list[bytes]], exchange.all_gather(short, "constants of the graph")), strict=True)
            dependent.update(name for name, column in zip(self.names, columns, strict=True) if len(set(column)) > 1)
        return frozenset(dependent)

    def _raise_difference(self, gathered: list[object]) -> None:
        for number, column in enumerate(zip_longest(*cast(list[list[str]], gathered), fillvalue="no node")):
            camps: dict[str, list[int]] = defaultdict(list)
            for rank, structure in enumerate(column):
                camps[structure].append(rank)
            if len(camps) > 1:
                found = " against ".join(f"{structure!r} on ranks {ranks}" for structure, ranks in camps.items())
                name = self.names[number] if number < len(self.names) else "past the end"
                raise RanksDifferError(
                    f"node {number} ({name}): expected the same graph on every rank, found {found}; "
                    "remove what makes the model's code depend on the rank"
                )
        raise AssertionError("structures have different digests and the same text")


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _structure(gm: fx.GraphModule, node: fx.Node, numbers: dict[fx.Node, str], found: list[str]) -> str:
    """What the node does to which nodes; its constants are appended to ``found``."""
    if node.op == "placeholder":
        return "placeholder"
    if node.op in ("get_attr", "call_module"):
        target = _attribute(operator.attrgetter(str(node.target))(gm), found)
    else:
        target = _callable_name(node.target)
    groups = group_places(node.target)
    parts = [_GROUP if i in groups else _argument(arg, numbers, found) for i, arg in enumerate(node.args)]
    parts += [f"{k}={_GROUP if k in groups else _argument(arg, numbers, found)}" for k, arg in node.kwargs.items()]
    return f"{node.op} {target}({','.join(parts)})"


def _attribute(value: object, found: list[str]) -> str:
    if isinstance(value, fx.GraphModule):
        code = _GraphCode.of(value)
        found.append(_OPAQUE if any(_OPAQUE in constants for constants in code.constants) else code.digests[1])
        return f"graph {code.digests[0]}"
    found.append(fingerprint(value) if isinstance(value, Tensor) and _is_readable(value) else _OPAQUE)
    return type(value).__name__


@cache
def _schema_groups(op: OpOverload) -> frozenset[int | str]:
    return _places([argument.name for argument in op._schema.arguments])


def group_places(target: Callable[..., object] | str) -> frozenset[int | str]:
    """Places and names of the arguments that name a process group."""
    if isinstance(target, OpOverload):
        return _schema_groups(target)
    if isinstance(target, FunctionType) and target.__module__.startswith("torch.distributed"):
        return _places(list(signature(target).parameters))
    return frozenset()


def _places(names: list[str]) -> frozenset[int | str]:
    return frozenset(key for place, name in enumerate(names) if name in _GROUP_ARGUMENTS for key in (place, name))


def _callable_name(target: object) -> str:
    if isinstance(target, (FunctionType, BuiltinFunctionType, type)):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)


def _argument(value: object, numbers: dict[fx.Node, str], found: list[str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, _PLAIN):
        found.append(repr(value))
        return "?"
    if isinstance(value, (list, tuple)):
        return f"[{','.join([_argument(item, numbers, found) for item in value])}]"
    if isinstance(value, dict):
        return f"{{{','.join([f'{key}:{_argument(item, numbers, found)}' for key, item in value.items()])}}}"
    if isinstance(value, slice):
        return f"slice{_argument([value.start, value.stop, value.step], numbers, found)}"
    if isinstance(value, (dist.ProcessGroup, DeviceMesh)):
        return _GROUP
    found.append(_constant(value))
    return "?"


def _constant(value: object) -> str:
    if isinstance(value, torch.device):
        return value.type  # its number differs on every rank of a host
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "symbol"  # sizes are the same by the contract of the axis; names of symbols need not be
    return _callable_name(value) if isinstance(value, _CALLABLE) else _OPAQUE


def structure_fingerprint(gm: fx.GraphModule) -> str:
    """Identifies a graph by its structure and its inputs' shapes and dtypes; the same on every rank that runs it."""
    code = _GraphCode.of(gm)
    values = (node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder"))
    shapes = (f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else "" for v in values)
    return _digest([*code.structures, *shapes])[:16]
