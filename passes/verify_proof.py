"""What a static proof says, and the checks that end every one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.verify_arguments import Arguments, Refused, View, op_name
from cpcompile.passes.verify_index import Shape, same, tensor_shape
from cpcompile.passes.verify_numbering import Numbering


@dataclass(frozen=True)
class Failure:
    """What could not be proven: the rewritten graph's node, and one line on what was expected and found."""

    node: str
    message: str


@dataclass(frozen=True)
class Proof:
    """The outcome.

    Args:
        holds: every output is whole and every value is accounted for.
        failures: the nodes at which it does not, without what only follows from another failure.
        facts: rewritten node name → what it was shown to be, such as ``"Shard(1) of mul_150"``.
        same: names of the rewritten nodes that were shown to be the same on all ranks.
        trusts: ops that are row-wise by the user's statement, which is not proven.
    """

    holds: bool
    failures: tuple[Failure, ...]
    facts: Mapping[str, str]
    same: frozenset[str] = frozenset()
    trusts: tuple[str, ...] = ()


def check_shapes(node: fx.Node, shown: Sequence[Shape]) -> None:
    """What the graph says of its shapes is what was shown of each result: lowering relies on it.

    Raises:
        Refused: it says otherwise.
    """
    value = node.meta.get("val")
    claimed: Sequence[object] = value if isinstance(value, list | tuple) else [value]
    for said, sizes in zip(claimed, shown, strict=False):
        if isinstance(said, torch.Tensor):
            stated = tensor_shape(said)
            if len(stated) != len(sizes) or not all(map(same, stated, sizes)):
                raise Refused(f"expected shape {list(sizes)}; its meta says {list(stated)}", 2)


def check_outputs(
    node: fx.Node,
    original: Numbering,
    arguments: Arguments,
    found: Callable[[fx.Node, View], str | None],
    failed: bool,
) -> list[Failure]:
    """What is wrong with the outputs of a rewritten graph.

    Args:
        node: its output node.
        original: the graph that it must equal.
        arguments: how its constants are read.
        found: what a node was shown to be instead of that value, ``""`` if it is that, None if nothing is known of it.
        failed: something failed before: of what nothing is known the reason has been told.

    Raises:
        Refused: another number of outputs.
    """
    failures: list[Failure] = []
    mine, theirs = _outputs(node), _outputs(original.output)
    if len(mine) != len(theirs):
        raise Refused(f"expected {len(theirs)} outputs; found {len(mine)}")
    for index, (new, old) in enumerate(zip(mine, theirs, strict=True)):
        told = new.name if isinstance(new, fx.Node) else node.name
        wanted = original.env.get(old) if isinstance(old, fx.Node) else None
        if wanted is None or len(wanted) != 1:
            if arguments.constant(new) != original.constant(old):
                failures.append(Failure(told, f"{told}: expected output {index} to be {old}; found {new}"))
            continue
        instead = found(new, wanted[0]) if isinstance(new, fx.Node) else None
        if instead:
            expected = f"expected output {index} to be Whole of {original.name(wanted[0])}"
            failures.append(Failure(told, f"{told}: {expected}; found {instead}"))
        elif instead is None and not failed and not failures:
            failures.append(Failure(told, f"{told}: expected output {index} to be {old}; found {new}"))
    return failures


def told_op(node: fx.Node) -> str:
    """The node's op, as messages name it."""
    return op_name(node.target).replace("::", ".")


def _outputs(node: fx.Node) -> list[object]:
    values = node.args[0]
    return list(values) if isinstance(values, list | tuple) else [values]
