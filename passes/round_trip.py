"""A reduce-scatter whose result is gathered again at once is an all-reduce."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from cpcompile.passes.collectives import (
    NATIVE,
    bound,
    emit_waited,
    erase,
    group_name_of,
    is_wait,
    only_user,
    sizes,
    strides,
)

aten = torch.ops.aten


def collapse_round_trip(gather: fx.Node) -> bool:
    """Collapse the round trip that ends in ``gather``; returns whether there was one.

    Before -> after: ``all_gather(reduce_scatter(x))`` -> ``all_reduce(x)``, with the ``cat(split(x))`` around it that
    funcol and DTensor write for a dim other than 0.
    Leaves alone: another group, dim or reduction, a scattered value that somebody else uses, and a symbolic size ``T``
    of the scattered dim, of which the gather's consumers think as ``n*(T//n)``.
    """
    tensor, ranks, _ = bound(gather)
    end, scatter = only_user(gather), tensor.args[0] if is_wait(tensor) else None
    if end is None or not is_wait(end) or scatter is None or scatter.target is not NATIVE.reduce_scatter_tensor.default:
        return False
    if only_user(tensor) is not gather or only_user(scatter) is not tensor:
        return False
    source, reduce_op, scattered, _ = bound(scatter)
    if (reduce_op, scattered, group_name_of(scatter)) != ("sum", ranks, group_name_of(gather)):
        return False
    ends = _unchunked(source, end)
    if ends is None:
        return False
    source, end = ends
    if sizes(source) is None or sizes(source) != sizes(end) or strides(source) != strides(end):
        return False
    end.replace_all_uses_with(emit_waited(end, NATIVE.all_reduce.default, source, "sum", bound(gather)[2]))
    erase(end, collectives=True)
    return True


def _unchunked(source: fx.Node, end: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Widen ``source .. end`` over a ``cat(split(...))`` before and its inverse after; None if they do not match."""
    split = only_user(end)
    after = next((user for part in split.users for user in part.users), None) if split is not None else None
    there, back = _unsplit(source), _unsplit(after)
    if there is None and back is None:
        return source, end
    if there is None or back is None or after is None:
        return None
    # That the second moves back all that the first moved shows in the sizes, which the caller compares.
    return there, after


def _unsplit(cat: fx.Node | None) -> fx.Node | None:
    """``x`` of a ``cat(split(x))`` with its chunks in order and no other user.

    It moves one dim into another: funcol and DTensor put the dim that they scatter at the front with it, and back.
    """
    if cat is None or cat.target is not aten.cat.default:
        return None
    parts = bound(cat)[0]
    split = parts[0].args[0] if parts[0].target is operator.getitem else None
    if not isinstance(split, fx.Node) or split.target is not aten.split.Tensor:
        return None
    if any(part.args != (split, i) or only_user(part) is not cat for i, part in enumerate(parts)):
        return None
    source: fx.Node = bound(split)[0]
    return source
