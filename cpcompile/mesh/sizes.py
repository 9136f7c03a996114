"""Sizes of parallel groups: what a user gives, what follows from it, and what no system can run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from cpcompile.errors import GroupError, nearest
from cpcompile.mesh.orders import ALONG, ATTENTION, AXES, EXPERTS, Order

MODULES = ("o_proj", "lm_head", "embedding", "mlp")
_FLAGS = ("shared_weight", "mc2", "module_along")


@dataclass(frozen=True)
class Sizes:
    """Numbers of ranks. None: the size follows from the others, or the group is not wanted.

    Args:
        world: all ranks. Gives ``external_dp``, or ``tp`` where dp and cp are inside tp, when those are not given.
        external_dp: replicas that never communicate.
        dp: replicas of attention that share experts or modules.
        pp: pipeline stages.
        cp: prefill context parallelism outside of tp (SGLang, cann-recipes: ``attn_cp``).
        tp: tensor parallelism; ``attn_dp·attn_cp·attn_tp = tp``.
        attn_dp: data parallelism of attention within tp.
        attn_cp: context parallelism of attention within tp.
        attn_tp: heads.
        moe_dp: copies of the experts within a stage; ``moe_dp·moe_ep·moe_tp`` = ranks of a stage.
        moe_ep: expert parallelism.
        moe_tp: each expert's own tensor parallelism.
        o_proj: ranks that share one o_proj; so too ``lm_head``, ``embedding``, ``mlp`` (dense layers).
        lm_head: see ``o_proj``.
        embedding: see ``o_proj``.
        mlp: see ``o_proj``.
        flashcomm2_otp: FlashComm 2, ranks that share one o_proj within attn_tp.
        prefill_tp_ratio: KV producers that are not MLA: tp of prefill / tp of decode.
        head_replicas: ranks of attn_tp that hold the same KV head.
        shared_weight: whether whole layers are spread over a stage and broadcast.
        mc2: whether experts dispatch and combine through MC2 kernels.
        module_along: what module groups run along: "dp", "cp", "tp" or "stage" (the order's own when None).
    """

    world: int | None = None
    external_dp: int | None = None
    dp: int | None = None
    pp: int | None = None
    cp: int | None = None
    tp: int | None = None
    attn_dp: int | None = None
    attn_cp: int | None = None
    attn_tp: int | None = None
    moe_dp: int | None = None
    moe_ep: int | None = None
    moe_tp: int | None = None
    o_proj: int | None = None
    lm_head: int | None = None
    embedding: int | None = None
    mlp: int | None = None
    flashcomm2_otp: int | None = None
    prefill_tp_ratio: int | None = None
    head_replicas: int | None = None
    shared_weight: bool = False
    mc2: bool = False
    module_along: str | None = None

    def resolve(self, order: Order) -> Sizes:
        """These sizes with every axis filled in.

        Raises:
            GroupError: a size is not a positive integer, or sizes do not fit: the constraint, the numbers, and the
                nearest sizes that work.
        """
        self._check_values()
        filled = _fill(self, order)
        broken = [rule for rule in _rules(filled, order) if not rule.holds]
        if broken:
            raise GroupError(f"rank groups ({order.name}): {broken[0].text}; {_remedy(self, order, broken)}")
        return filled

    def _check_values(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise GroupError(
                    f"rank groups: {name}: expected an integer of at least 1, found {value!r}; use 1 or more"
                )
        if self.module_along not in (None, *ALONG):
            known = nearest(str(self.module_along), ALONG)
            raise GroupError(f"rank groups: module_along: found {self.module_along!r}{known}")

    def product(self, names: tuple[str, ...]) -> int:
        """The product of the sizes called ``names``, which are filled in."""
        return math.prod(getattr(self, name) for name in names)


NUMBERS = tuple(field.name for field in fields(Sizes) if field.name not in _FLAGS)


@dataclass(frozen=True)
class _Rule:
    """One constraint: what it says, what was found, which sizes may give way, and the largest number in it."""

    says: str
    found: str
    holds: bool
    sizes: tuple[str, ...]
    largest: int = 1

    @property
    def text(self) -> str:
        return f"expected {self.says}, found {self.found}"


def stage_axes(order: Order) -> tuple[str, ...]:
    """The axes of ``order`` whose ranks are one pipeline stage."""
    return tuple(axis for axis in order.axes if axis not in ("external_dp", "pp"))


def module_axes(sizes: Sizes, order: Order) -> tuple[str, ...]:
    """The axes that module groups run along: those of the order's grid alone."""
    grid = (*order.axes, *ATTENTION)
    return tuple(axis for axis in ALONG[sizes.module_along or order.module_along] if axis in grid)


def _fill(given: Sizes, order: Order) -> Sizes:
    known: dict[str, Any] = {name: getattr(given, name) for name in NUMBERS if getattr(given, name) is not None}
    inside = order.dp_inside_tp
    if inside:
        for outer, inner in (("dp", "attn_dp"), ("cp", "attn_cp")):
            if outer in known:
                known.setdefault(inner, known[outer])
    if "tp" not in known:
        rest = math.prod(known.get(axis, 1) for axis in order.axes)
        from_world = inside and "world" in known
        known["tp"] = known["world"] // rest if from_world else math.prod(known.get(axis, 1) for axis in ATTENTION)
    _split(known, ATTENTION, known["tp"], order.inferred[0])
    for axis in ("dp", "cp"):
        known.setdefault(axis, known[f"attn_{axis}"] if inside else 1)
    _split(known, EXPERTS, math.prod(known[axis] for axis in stage_axes(order)), order.inferred[1])
    known.setdefault("pp", 1)
    replica = math.prod(known[axis] for axis in order.axes if axis != "external_dp")
    known.setdefault(
        "external_dp", known.get("world", replica) // max(1, replica) if "external_dp" in order.axes else 1
    )
    known.setdefault("world", replica * known["external_dp"])
    return replace(given, **{name: max(1, value) for name, value in known.items()})


def _split(known: dict[str, Any], parts: tuple[str, ...], whole: int, inferred: str) -> None:
    """Give the part that nobody gave what the others leave of ``whole``: ``inferred``, or else its counterpart."""
    counterpart = {"attn_tp": "attn_dp", "attn_dp": "attn_tp", "moe_tp": "moe_ep", "moe_ep": "moe_tp"}[inferred]
    taker = next((name for name in (inferred, counterpart) if name not in known), None)
    for name in parts:
        if name != taker:
            known.setdefault(name, 1)
    if taker is not None:
        known[taker] = whole // math.prod(known[name] for name in parts if name != taker)


def _rules(s: Sizes, order: Order) -> Iterator[_Rule]:
    """Every constraint on the filled sizes ``s``, in the order in which a user should mend them."""
    yield from _axis_rules(s, order)
    yield _product("tp", ATTENTION, ("tp",), s)
    yield _product("ranks of a stage", EXPERTS, stage_axes(order), s)
    if order.name == "sglang":
        yield from _sglang_rules(s)
    along = module_axes(s, order)
    for module in MODULES:
        if getattr(s, module) is not None:
            yield _divides(_shown(s, along), s.product(along), module, s, along)
    if s.flashcomm2_otp is not None:
        yield _divides("attn_tp", s.product(("attn_tp",)), "flashcomm2_otp", s, ("attn_tp", "tp"))
        cut = (s.o_proj or 1) > 1
        found = f"o_proj {s.o_proj}, flashcomm2_otp {s.flashcomm2_otp}"
        yield _Rule("o_proj to be cut by one of o_proj and flashcomm2_otp", found, not cut, ("o_proj",))
        whole = s.flashcomm2_otp == 1 or not s.shared_weight
        found = f"flashcomm2_otp {s.flashcomm2_otp}"
        yield _Rule("flashcomm2_otp = 1 (a whole o_proj) with shared_weight", found, whole, ("flashcomm2_otp",))
    ratio = s.prefill_tp_ratio or 1
    if s.prefill_tp_ratio is not None:
        yield _divides("attn_tp", s.product(("attn_tp",)), "prefill_tp_ratio", s, ("attn_tp", "tp"))
    if s.head_replicas is not None:
        yield _divides("prefill_tp_ratio", ratio, "head_replicas", s, ("prefill_tp_ratio",))


def _axis_rules(s: Sizes, order: Order) -> Iterator[_Rule]:
    yield _product("world", order.axes, ("world",), s)
    for axis in AXES:
        if axis in order.axes:
            continue
        size = getattr(s, axis)
        if order.dp_inside_tp:
            inner = f"attn_{axis}"
            found = f"{axis} {size}, {inner} {getattr(s, inner)}"
            yield _Rule(f"{axis} = {inner} (it divides tp here)", found, size == getattr(s, inner), (axis, inner))
        else:
            yield _Rule(f"{axis} = 1, since the order has no such axis", f"{axis} {size}", size == 1, (axis,))


def _sglang_rules(s: Sizes) -> Iterator[_Rule]:
    """SGLang's server arguments. Its ``pp = 1`` where cp or moe_dp > 1 is not among them: no group crosses a stage."""
    numbers = f"moe_ep {s.moe_ep}, moe_dp {s.moe_dp}, tp {s.tp}"
    holds = s.moe_ep == 1 or s.product(("moe_ep", "moe_dp")) == s.tp
    yield _Rule("moe_ep·moe_dp = tp where moe_ep > 1", numbers, holds, ("moe_ep", "moe_dp"))
    numbers = f"moe_dp {s.moe_dp}, attn_cp {s.attn_cp}"
    yield _Rule("moe_dp to be 1 or attn_cp", numbers, s.moe_dp in (1, s.attn_cp), ("moe_dp", "attn_cp"))


def _product(name: str, parts: tuple[str, ...], wholes: tuple[str, ...], s: Sizes) -> _Rule:
    left, right = s.product(parts), s.product(wholes)
    numbers = " · ".join(f"{part} {getattr(s, part)}" for part in parts)
    found = f"{numbers} = {left} and {name} {right}"
    return _Rule(f"{'·'.join(parts)} = {name}", found, left == right, (*parts, *wholes), max(left, right))


def _divides(whole_name: str, whole: int, part: str, s: Sizes, wholes: tuple[str, ...]) -> _Rule:
    size = getattr(s, part)
    found = f"{whole} % {size} = {whole % size}"
    return _Rule(f"{whole_name} % {part} = 0", found, whole % size == 0, (part, *wholes), max(whole, size))


def _shown(s: Sizes, axes: tuple[str, ...]) -> str:
    return "·".join(axis for axis in axes if s.product((axis,)) > 1) or axes[0]


def _remedy(given: Sizes, order: Order, broken: list[_Rule]) -> str:
    """The nearest values, above and below, of each size that a user gave and that alone mend everything."""

    def mends_all(sizes: Sizes) -> bool:
        return all(rule.holds for rule in _rules(_fill(sizes, order), order))

    def mends_first(sizes: Sizes) -> bool:
        return all(rule.holds for rule in _rules(_fill(sizes, order), order) if rule.says == broken[0].says)

    best = _nearest_sizes(given, order, broken[0], mends_all)
    if best:
        return f"nearest that work: {best}"
    others = "; ".join(rule.text for rule in broken[1:])
    also = f"; broken too: {others}" if others else ""
    some = _nearest_sizes(given, order, broken[0], mends_first)
    return f"nearest for this alone: {some}{also}" if some else f"no change of one size mends it{also}"


def _changed(given: Sizes, name: str, value: int | str) -> Sizes:
    change: dict[str, Any] = {name: value}
    return replace(given, **change)


def _nearest_sizes(given: Sizes, order: Order, rule: _Rule, works: Callable[[Sizes], bool]) -> str:
    # Far enough for the next multiple of a few sizes at once.
    limit = 4 * max(rule.largest, *(getattr(given, name) or 1 for name in (*rule.sizes, "tp")))
    found = []
    # Where dp is attn_dp, a user may have given either.
    aliases = ("dp", "cp") if order.dp_inside_tp else ()
    for name in dict.fromkeys((*rule.sizes, *(alias for alias in aliases if f"attn_{alias}" in rule.sizes))):
        value = getattr(given, name)
        if value is None:
            continue
        sides = (range(value - 1, 0, -1), range(value + 1, limit + 1))
        values = [next((str(v) for v in side if works(_changed(given, name, v))), None) for side in sides]
        if any(values):
            found.append(f"{name} {' or '.join(v for v in values if v)}")
    if rule.sizes[0] in MODULES:
        ways = [way for way in ALONG if works(_changed(given, "module_along", way))]
        found += [f"module_along {' or '.join(ways)}"] if ways else []
    return ", ".join(found)
