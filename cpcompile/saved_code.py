"""Compiled code that can be saved, as PyTorch's ``aot_compile`` and vLLM do, and what it rests on.

Reloaded code refuses to run until ``reload.settle`` has compared with the other ranks what it rests on.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.aot_compile_types import SerializableCallable
from torch._functorch._aot_autograd.aot_autograd_result import deserialize_bundled_cache_entry
from torch.distributed.tensor import DTensor

from cpcompile.axes import Axis, is_group
from cpcompile.compiled import Compiled
from cpcompile.errors import ReloadError
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.identity import identity
from cpcompile.options import Options
from cpcompile.run_code import Check, RunCode, group_names, holds_tensors


@dataclass
class Grounds:
    """What saved code rests on.

    Args:
        identity: see ``cpcompile.identity``.
        axes: the mesh axes.
        words: axis name → a word that its ranks agreed on in this compilation and in no other.
        same: axis name → inputs whose contents were seen to be the same on all of its ranks.
        watched: place among the graph's inputs → name, of all of these.
        weights: parameter or buffer of the model → its shape and dtype.
        done: what was rewritten, as the log says it.
        refusal: why this code cannot be saved; empty where it can.
    """

    identity: dict[str, str]
    axes: list[Axis] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    same: dict[str, list[str]] = field(default_factory=dict)
    watched: dict[int, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    refusal: str = ""


def grounds_of(
    compiled: Compiled,
    inputs: Sequence[GraphInput],
    options: Options,
    target: str,
    exchange_for: Callable[[Axis], Exchange],
    done: list[str],
) -> Grounds:
    """The grounds of what was compiled just now. Costs one exchange on each axis.

    Raises:
        AxisError: a rank does not take part.
    """
    found = Grounds(identity(options), list(compiled.axes), done=done)
    found.weights = {i.name: form(i.value) for i in inputs if i.kind in ("parameter", "buffer")}
    for axis, places in compiled.watched():
        words = exchange_for(axis).all_gather(uuid.uuid4().hex, "word of this compilation")
        found.words[axis.name] = str(words[0])
        seen = {i: inputs[i].name for i in places}
        found.same[axis.name] = list(seen.values())
        found.watched.update(seen)
    found.refusal = _refusal(compiled, inputs, target)
    return found


def form(value: object) -> str:
    """Shape and dtype of a weight, as words; of any other object its type."""
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _refusal(compiled: Compiled, inputs: Sequence[GraphInput], target: str) -> str:
    if target != "eager":
        return f"code of target {target!r} is not kept, only graphs that run op by op"
    if compiled.left_alone:
        axis, reason = next(iter(compiled.left_alone.items()))
        return f"axis {axis} is left alone: {reason}; the next start tries again"
    if compiled.sharing is not None and compiled.sharing.recipes:
        return "parts of weights that ranks share are made when the graph is compiled"
    if any(isinstance(given.value, DTensor) for given in inputs):
        return "placements of DTensors are known when the graph is compiled"
    if any(holds_tensors(v.gm) for v in compiled.variants):
        return "the graph holds tensors of its own, which may be weights of this start"
    return _foreign_groups(compiled)


def _foreign_groups(compiled: Compiled) -> str:
    """PyTorch names groups as they are made: only those of an axis are found again."""
    names = {name for v in compiled.variants for name in group_names(v.gm)}
    names = {name for name in names if not any(axis.owns(name) for axis in compiled.axes)}
    foreign = sorted(name for name in names if ":" not in name and is_group(name))
    return f"the graph has collectives over group {foreign[0]!r}, which is no axis" if foreign else ""


class SavedCode(SerializableCallable):
    """What the backend gives to ``aot_compile``: runs the graph, and can be saved.

    Args:
        call: AOTAutograd's callable; None for code that was read from a file and is not settled.
        grounds: what it rests on.
        pickled: AOTAutograd's entry, for code that was read.
    """

    def __init__(self, call: Callable[..., Any] | None, grounds: Grounds, pickled: bytes = b"") -> None:
        """Hold both."""
        self._call = call
        self.grounds = grounds
        self._pickled = pickled
        self._code: RunCode | None = None
        self._read: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph. Raises :class:`ReloadError` for reloaded code before ``start``."""
        if self._call is None:
            raise ReloadError("saved code runs only after the ranks compared it: call cpcompile.reload.settle first")
        return self._call(*args, **kwargs)

    def read(self) -> None:
        """Read the code, which may fail; it does not run yet."""
        entry = pickle.loads(self._pickled)
        self._code = entry.compiled_fw.result
        self._read = deserialize_bundled_cache_entry(entry)

    def start(self, groups: Mapping[str, str], before: Check) -> None:
        """Run what was read from now on; see :meth:`RunCode.start`."""
        assert self._code is not None, "read() comes first"
        self._code.start(groups, before)
        self._call = self._read

    def finalize_loading(self, vllm_config: object) -> None:
        """Called by vLLM when it has read a file. What is to be done needs the model: see ``reload.settle``."""

    @classmethod
    def serialize_compile_artifacts(cls, fn: SavedCode) -> bytes:
        """The contents of a file. Raises :class:`ReloadError` for code that cannot be saved."""
        if fn.grounds.refusal:
            raise ReloadError(f"cpcompile: this code is not saved: {fn.grounds.refusal}")
        return pickle.dumps((fn.grounds, fn._pickled or _pickle(fn._call)))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> SavedCode:
        """Code that was saved, which does not run yet."""
        grounds, pickled = pickle.loads(data)
        return cls(None, grounds, pickled)


def _pickle(call: Any) -> bytes:
    entry = call.serialize()
    failure = entry.compiled_fw.result.failure
    if failure:
        raise ReloadError(f"cpcompile: this code is not saved: {failure}")
    return pickle.dumps(entry)


def is_wanted() -> bool:
    """Whether the caller of the backend wants code that can be saved: PyTorch's ``aot_compile`` says so like this."""
    return bool(torch._functorch.config.force_autograd_cache)


def compiled_once() -> Any:
    """While AOTAutograd compiles: its own cache must not answer, since ranks agree in every compilation."""
    return torch.compiler.config.patch(cache_key_tag=uuid.uuid4().hex)  # type: ignore[attr-defined]
