"""Doctor: what is installed, which targets work here, and how to get the others."""

from __future__ import annotations

from collections.abc import Iterator

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend.installation import AUTOLOAD, Installation, autoload_fails, find, import_torchair
from cpcompile.lowering.targets import ON_DEVICE


def examine() -> Iterator[str]:
    """One line for each thing and each target; imports torch_npu where that can work."""
    found = find()
    yield f"torch       {found.torch}"
    yield f"torch_npu   {found.torch_npu or 'not installed'}"
    yield f"CANN        {'installed' if found.cann else 'not installed: inert libraries stand in for it'}"
    yield f"C compiler  {found.compiler or 'not found'}"
    yield ""
    yield "eager        works"
    yield "inductor     works"
    for target, device in ON_DEVICE.items():
        why = _why_not(target, device, found)
        yield f"{target:<12} {'does not work: ' + why if why else 'works'}"
    yield "              (ge-export writes graphs; it never runs one)"
    if autoload_fails():
        yield ""
        yield (
            f"WARNING: `import torch` fails in this environment unless {AUTOLOAD}=0 is set: PyTorch imports torch_npu "
            "by itself, and that needs CANN"
        )


def _why_not(target: str, device: bool, found: Installation) -> str:
    try:
        import_torchair(target, device)
    except AscendError as error:
        return str(error).partition(": ")[2]
    return found.no_device() if device and not find().npus else ""
