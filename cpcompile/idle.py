"""A step without tokens: what a rank runs so that the ranks that share its modules can go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from cpcompile.errors import CpcompileError
from cpcompile.weights import local_tensor


class IdleStepError(CpcompileError):
    """A rank without tokens cannot take part in the others' step in this way."""


@dataclass(frozen=True)
class _Step:
    """One compiled graph's part of a step without tokens: it belongs to the model that has all of ``weights``."""

    weights: tuple[TensorWeakRef, ...]
    run: Callable[[], object]
    refusal: str

    def of(self, tensors: Sequence[torch.Tensor]) -> bool:
        known = {id(tensor) for tensor in tensors}
        return all((weight := ref()) is not None and id(weight) in known for ref in self.weights)

    def same_weights(self, other: _Step) -> bool:
        return {id(ref()) for ref in self.weights} == {id(ref()) for ref in other.weights}


_steps: list[_Step] = []


def register(weights: Sequence[torch.Tensor], run: Callable[[], object], refusal: str = "") -> None:
    """Note what an idle rank runs for the graph that shares ``weights``, in the place of an earlier compilation."""
    new = _Step(tuple(TensorWeakRef(w) for w in weights), run, refusal)
    _steps[:] = [s for s in _steps if all(ref() is not None for ref in s.weights)]
    for index, step in enumerate(_steps):
        if step.same_weights(new):
            _steps[index] = new
            return
    _steps.append(new)


@torch.no_grad()
def idle_step(model: nn.Module) -> None:
    """Take part, without tokens, in one step of the ranks that share modules of ``model`` with this one.

    Call it on a rank that has no tokens in a step in which other ranks of its data-parallel group have some. It issues
    the collectives of the shared modules with zeros, in the order of the compiled model.

    Args:
        model: the module that was compiled with module tensor parallelism, or the result of ``torch.compile``.

    Raises:
        IdleStepError: the model was not compiled on this rank yet, or has collectives of its own that idle ranks must
            join: call it with a dummy token instead, as without cpcompile.
    """
    inner = getattr(model, "_orig_mod", model)
    tensors = [local_tensor(value) for value in [*inner.parameters(), *inner.buffers()]]
    steps = [step for step in _steps if step.of(tensors)]
    if not steps:
        raise IdleStepError(
            "idle_step: this rank has compiled no shared module of the model: call the model once, with a dummy token"
        )
    refused = next((step.refusal for step in steps if step.refusal), "")
    if refused:
        raise IdleStepError(f"idle_step: {refused}: call the model with a dummy token instead")
    for step in steps:
        step.run()
