"""GE graphs as data: ops, their attributes, and the descriptors of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cpcompile.errors import CpcompileError

UNFED = ""
"""What stands for an optional input that is not given."""


class GeError(CpcompileError):
    """A GE graph cannot be read, bound or executed: one line with the op, what was expected and what was found."""


class Attr(NamedTuple):
    """An attribute: ``kind`` is the protobuf's name of its type (``i``, ``f``, ``b``, ``s``, ``list``, ``dt``, ...)."""

    kind: str
    value: Any


@dataclass
class TensorDesc:
    """What a graph says about a tensor.

    Args:
        name: the input's or output's name in the op's prototype.
        dtype: as torch's; None where the graph does not say, or says one that torch does not have.
        shape: -1 for sizes that are known at run time only; None where the graph does not say.
        traced: from the traced graph, so that it holds; others are made up where the graph says nothing.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    traced: bool = False


@dataclass
class GeOp:
    """One op: ``inputs`` name values, ``"op:0"`` for the first output of ``op``, in the order of ``input_descs``.

    ``after`` are names of ops that must run earlier, without a value from them. ``data`` is what a Const holds.
    """

    name: str
    type: str
    inputs: list[str] = field(default_factory=list)
    input_descs: list[TensorDesc] = field(default_factory=list)
    output_descs: list[TensorDesc] = field(default_factory=list)
    attrs: dict[str, Attr] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    data: torch.Tensor | None = None

    def error(self, reason: str) -> GeError:
        """An error at this op."""
        return GeError(f"op {self.name!r} ({self.type}): {reason}")


@dataclass
class GeGraph:
    """One rank's graph.

    Args:
        name: the graph's name.
        ops: in an order in which they may run.
        attrs: the graph's own attributes.
    """

    name: str
    ops: list[GeOp]
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    @property
    def inputs(self) -> list[GeOp]:
        """The ops that stand for the inputs, in the order in which values are given.

        Raises:
            GeError: their indices are not 0, 1, 2, ...
        """
        data = [op for op in self.ops if op.type in ("Data", "RefData")]
        data.sort(key=lambda op: int(op.attrs["index"].value) if "index" in op.attrs else 0)
        for position, op in enumerate(data):
            index = op.attrs["index"].value if "index" in op.attrs else 0
            if index != position:
                raise op.error(f"expected index {position} among the graph's inputs, found {index}")
        return data

    def op(self, name: str) -> GeOp:
        """The op of that name.

        Raises:
            GeError: there is none.
        """
        found = next((op for op in self.ops if op.name == name), None)
        if found is None:
            raise GeError(f"graph {self.name!r} has no op {name!r}")
        return found

    def of_type(self, op_type: str) -> list[GeOp]:
        """All ops of a type, in order."""
        return [op for op in self.ops if op.type == op_type]
