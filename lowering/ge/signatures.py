"""Signatures of GE ops: a reference kernel's Python signature is the op's prototype, and dtypes are checked against it.

Positional parameters are inputs (``x: Tensor``, optional ``x: Tensor | None``, dynamic ``x: Tensors``), keyword-only
ones attributes with the prototype's defaults. The dtype rule is GE's: an op does not promote its operands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType, TypeVar

import torch
from torch import Tensor

from cpcompile.errors import nearest
from cpcompile.lowering.ge import dtypes
from cpcompile.lowering.ge.graph import UNFED, GeOp

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

Tensors = Sequence[Tensor]
"""A dynamic input: any number of tensors, called ``x0, x1, ...`` in the graph."""

DType = NewType("DType", torch.dtype)
"""An attribute that is the number of a dtype in the graph."""

FLOAT = "float16|bfloat16|float32|float64"
INDEX = "int32|int64"
INTEGER = "int8|uint8|int16|int32|int64"
NUMBER = f"{FLOAT}|{INTEGER}"

# Attribute annotation -> kinds of the protobuf that say it.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "int": ("i",),
    "float": ("f",),
    "bool": ("b",),
    "str": ("s",),
    "DType": ("i", "dt"),
    "list[int]": ("list",),
    "list[float]": ("list",),
}

# What torchair adds to any op: layouts of private formats, and annotations, which begin with an underscore.
_ANNOTATIONS = frozenset({"input_layout_info", "output_layout_info", "nn_module_stack", "OUTPUT_IS_VAR"})


class Refusal(Exception):
    """A kernel's reason why it cannot execute an op: what was expected, what was found."""


def expect(holds: bool, reason: str) -> None:
    """Refuse the op for ``reason``, unless ``holds``."""
    if not holds:
        raise Refusal(reason)


def expect_unfed(**values: Tensor | Sequence[Tensor] | None) -> None:
    """Refuse optional inputs whose meaning is not part of the reference. An empty tensor stands for none."""
    for name, value in values.items():
        given = [value] if isinstance(value, Tensor) else list(value or [])
        expect(all(not v.numel() for v in given), f"input {name!r} is not part of the reference; expected it unfed")


def expect_default(found: Mapping[str, Any], **defaults: Any) -> None:
    """Refuse attribute values whose meaning is not part of the reference."""
    for name, default in defaults.items():
        allowed = default if isinstance(default, tuple) else (default,)
        said = " or ".join(map(repr, allowed))
        expect(found[name] in allowed, f"attribute {name!r}: expected {said}, found {found[name]!r}")


@dataclass(frozen=True)
class Operand:
    """An input or output of a prototype: ``types`` are dtypes or a variable, ``T``, that stands for one dtype."""

    name: str
    types: str
    optional: bool = False
    dynamic: bool = False


@dataclass(frozen=True)
class OpSpec:
    """One op type: its prototype and what computes it."""

    type: str
    run: Callable[..., Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: Mapping[str, inspect.Parameter]
    variables: Mapping[str, str]
    collective: bool

    @property
    def references(self) -> tuple[str, ...]:
        """Inputs that the op writes: they are outputs of the same name."""
        written = {operand.name for operand in self.outputs}
        return tuple(operand.name for operand in self.inputs if operand.name in written)


OPS: dict[str, OpSpec] = {}
"""Op type -> its reference. Filled by the modules ``ops_*``."""


def op(names: str, types: str, **variables: str) -> Callable[[Kernel], Kernel]:
    """Register a kernel as the reference of one or several op types.

    Args:
        names: the op types, separated by spaces.
        types: ``"T, T, index -> y:T"``: a rule for each input in order, and the outputs with theirs. A rule is dtypes
            with ``|`` between, ``any``, a variable, or for outputs ``=attribute``; an output ``*y`` is dynamic.
        variables: what a variable may stand for; unsaid, any dtype.
    """

    def register(run: Kernel) -> Kernel:
        inputs, attrs = _parameters(run, types)
        for name in names.split():
            assert name not in OPS, f"{name} is registered twice"
            made = _outputs(types)
            OPS[name] = OpSpec(name, run, inputs, made, attrs, variables, inspect.isgeneratorfunction(run))
        return run

    return register


def _parameters(run: Callable[..., Any], types: str) -> tuple[tuple[Operand, ...], dict[str, inspect.Parameter]]:
    rules = [rule.strip() for rule in types.split("->")[0].split(",") if rule.strip()]
    inputs, attrs = [], {}
    for parameter in inspect.signature(run).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.annotation in _KINDS, f"{run}: annotate attribute {parameter.name}"
            attrs[parameter.name] = parameter
        else:
            said = str(parameter.annotation)
            inputs.append((parameter.name.rstrip("_"), said == "Tensor | None", said.startswith("Tensors")))
    assert len(rules) == len(inputs), f"{run}: expected a dtype rule for each of {len(inputs)} inputs"
    return tuple(Operand(n, rule, o, d) for (n, o, d), rule in zip(inputs, rules, strict=True)), attrs


def _outputs(types: str) -> tuple[Operand, ...]:
    made = []
    for said in filter(None, (part.strip() for part in types.split("->")[1].split(","))):
        name, _, rule = said.partition(":")
        made.append(Operand(name.lstrip("*"), rule, dynamic=name.startswith("*")))
    return tuple(made)


def spec_of(ge_op: GeOp) -> OpSpec:
    """The reference of an op.

    Raises:
        GeError: its type is not known.
    """
    if ge_op.type not in OPS:
        raise ge_op.error(f"unknown op type{nearest(ge_op.type, OPS)}; write its reference from its documentation")
    return OPS[ge_op.type]


def bind_attrs(ge_op: GeOp, spec: OpSpec) -> dict[str, Any]:
    """The values of all attributes by name: those of the graph, else the prototype's defaults.

    Raises:
        GeError: an attribute is unknown or of another kind, or one without a default is missing.
    """
    values: dict[str, Any] = {}
    for name, attr in ge_op.attrs.items():
        if name in spec.attrs:
            said = str(spec.attrs[name].annotation)
            if attr.kind not in _KINDS[said]:
                raise ge_op.error(f"attribute {name!r}: expected {said}, found {attr.kind} {attr.value!r}")
            values[name] = _dtype(ge_op, name, attr.value) if said == "DType" else attr.value
        elif not name.startswith("_") and name not in _ANNOTATIONS:
            raise ge_op.error(f"unknown attribute {name!r} = {attr.value!r}{nearest(name, spec.attrs)}")
    for name, parameter in spec.attrs.items():
        if name not in values:
            if parameter.default is parameter.empty:
                raise ge_op.error(f"expected attribute {name!r}, found none")
            values[name] = parameter.default
    return values


def _dtype(ge_op: GeOp, name: str, number: int) -> torch.dtype:
    if number not in dtypes.OF_ATTRIBUTE:
        raise ge_op.error(f"attribute {name!r}: expected the number of a dtype that torch has, found {number}")
    return dtypes.OF_ATTRIBUTE[number]


def bind_inputs(ge_op: GeOp, spec: OpSpec, values: Mapping[str, Tensor]) -> list[Any]:
    """The kernel's positional arguments, by the names of the op's input descriptors.

    Raises:
        GeError: an input is unknown, missing, given twice or out of order.
    """
    given: dict[str, list[Tensor]] = {}
    for desc, source in zip(ge_op.input_descs, ge_op.inputs, strict=True):
        operand = next((o for o in spec.inputs if _names(o, desc.name, len(given.get(o.name, ())))), None)
        if operand is None:
            known = ", ".join(o.name for o in spec.inputs)
            raise ge_op.error(f"unknown or repeated input {desc.name!r} (known: {known})")
        if source != UNFED:
            given.setdefault(operand.name, []).append(values[source])
    arguments: list[Any] = []
    for operand in spec.inputs:
        found = given.get(operand.name, [])
        if not found and not operand.optional and not operand.dynamic:
            raise ge_op.error(f"expected input {operand.name!r}, found none")
        arguments.append(found if operand.dynamic else (found[0] if found else None))
    return arguments


def _names(operand: Operand, name: str, taken: int) -> bool:
    return name == (f"{operand.name}{taken}" if operand.dynamic else operand.name) and (operand.dynamic or not taken)


def check_inputs(ge_op: GeOp, spec: OpSpec, arguments: Sequence[Any]) -> dict[str, torch.dtype]:
    """Check the operands' dtypes and return what the variables stand for.

    Raises:
        GeError: a dtype is not one of the prototype's, or differs from an operand that must have the same.
    """
    bound: dict[str, tuple[str, torch.dtype]] = {}
    for operand, value in zip(spec.inputs, arguments, strict=True):
        for tensor in [value] if isinstance(value, Tensor) else value or []:
            _check(ge_op, spec, operand, tensor, bound)
    return {variable: dtype for variable, (_, dtype) in bound.items()}


def _check(
    ge_op: GeOp, spec: OpSpec, operand: Operand, tensor: Tensor, bound: dict[str, tuple[str, torch.dtype]]
) -> None:
    rule, found = operand.types, dtypes.short(tensor.dtype)
    if rule.isupper():
        first, dtype = bound.setdefault(rule, (operand.name, tensor.dtype))
        if tensor.dtype != dtype:
            raise ge_op.error(
                f"input {operand.name!r}: expected {dtypes.short(dtype)} as {first!r}, found {found}; cast it"
            )
        rule = spec.variables.get(rule, "any")
    if rule != "any" and found not in rule.split("|"):
        raise ge_op.error(f"input {operand.name!r}: expected {rule}, found {found}")


def check_outputs(
    ge_op: GeOp, spec: OpSpec, results: Sequence[Tensor], bound: Mapping[str, torch.dtype], attrs: Mapping[str, Any]
) -> None:
    """Check results against the prototype and against what the traced graph said of them.

    Raises:
        GeError: their number or a dtype differs.
    """
    if len(results) < len(ge_op.output_descs):
        raise ge_op.error(f"expected at most {len(results)} outputs, found {len(ge_op.output_descs)}")
    rules = [o.types for o in spec.outputs if not o.dynamic]
    rules += [o.types for o in spec.outputs if o.dynamic] * (len(results) - len(rules))
    for rule, result in zip(rules, results, strict=True):
        promised = attrs[rule[1:]] if rule.startswith("=") else bound.get(rule)
        if promised is not None:
            assert result.dtype == promised, f"{ge_op.type}: the kernel made {result.dtype}, not {promised}"
        elif not rule.isupper() and rule != "any":
            assert dtypes.short(result.dtype) in rule.split("|"), f"{ge_op.type}: the kernel made {result.dtype}"
    for position, (desc, result) in enumerate(zip(ge_op.output_descs, results, strict=False)):
        if desc.traced and desc.dtype is not None and desc.dtype != result.dtype:
            raise ge_op.error(
                f"output {position}: the traced graph expects {dtypes.short(desc.dtype)}, found "
                f"{dtypes.short(result.dtype)}; a cast is missing"
            )
