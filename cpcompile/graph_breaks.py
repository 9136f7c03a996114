"""Where dynamo broke a model into several graphs, each of which reaches the backend alone."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.fx as fx

log = logging.getLogger("cpcompile")


@dataclass
class _Model:
    """What came of one call of torch.compile: the first break, and how many graphs."""

    broken: str = ""
    graphs: int = 0


_models: weakref.WeakKeyDictionary[Any, _Model] = weakref.WeakKeyDictionary()


def where_broken(gm: fx.GraphModule) -> str:
    """Where dynamo first broke the model of which ``gm`` is one graph, and why; empty where ``gm`` is all of it.

    To be called while dynamo compiles ``gm``: what surrounds a graph is read from the stack. When the second graph of
    a model comes, the log says that there are several.
    """
    caller, compiled = _surroundings()
    reason = getattr(gm, "compile_subgraph_reason", None)
    breaks = reason is not None and reason.graph_break  # every graph has a reason; without a break "return_value"
    if not breaks and not caller:
        return ""
    model = _models.setdefault(compiled, _Model()) if compiled is not None else _Model()
    model.graphs += 1
    model.broken = model.broken or (_told(reason) if breaks else f"{caller} runs in Python")
    if model.graphs == 2:
        log.warning("cpcompile: %s", _SEVERAL.format(model.broken))
    return model.broken


_SEVERAL = (
    "dynamo breaks the model: 2 graphs of it so far, each compiled alone ({0}); context parallelism gathers latents "
    "for the whole of attention and needs one graph: TORCH_LOGS=graph_breaks names every break, fullgraph=True raises "
    "at the first"
)


def _told(reason: Any) -> str:
    what = next(iter(reason.reason.splitlines()), "")
    return " ".join(f"{at.filename}:{at.lineno} in {at.name}: {what}" for at in reason.user_stack[-1:]) or what


_TORCH = os.path.dirname(torch.__file__) + os.sep
_ENTRY = os.path.join(_TORCH, "_dynamo", "convert_frame.py")  # Python calls it for a frame that is to be compiled


def _surroundings() -> tuple[str, Any]:
    """Which frame of the model calls what is compiled now, and what stands for the model as torch.compile gave it.

    None calls a model that is one graph. Where it broke, the code before the break does, or a frame that dynamo left to
    Python altogether, as one with a break in a loop.
    """
    caller = ""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if file == _ENTRY:
            caller = ""  # until here it is dynamo, and what it calls
        elif name == "compile_wrapper" and file.startswith(_TORCH):
            return caller, frame.f_locals.get("self")
        elif not caller and not file.startswith(_TORCH):
            caller = f"{file}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    return "", None  # not called through what torch.compile gave
