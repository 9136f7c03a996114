"""Where FlashComm 2 applies: products whose summand rows are moved and then summed over tp, and nothing else.

Refuses, with the reason: a summand that anything else reads or that is more than moved by rows before its sum; rows
that do not lead; rows with a scale each, scales that differ between ranks; weights that ``weight_cuts`` cannot follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.errors import GroupError
from cpcompile.passes.base import Refusal
from cpcompile.passes.collectives import NATIVE, arguments, group_name_of, is_contiguous, is_wait, only_user, op_name
from cpcompile.passes.products import Product, product_of
from cpcompile.passes.row_moves import RowMoves
from cpcompile.passes.weight_cuts import CutRefused, Cuts


@dataclass(frozen=True)
class FlashGroups:
    """The ranks that FlashComm 2 runs over.

    Args:
        tp: the tensor-parallel axis of attention.
        otp: kind ``flashcomm2_otp`` of ``cpcompile.mesh``: ranks whose partial sums make one row. Size 1 for otp = 1.
        odp: kind ``flashcomm2_odp``: ranks that exchange columns for rows.

    Raises:
        GroupError: the groups are not those of one otp for this rank, or rows are not dealt in one block to a rank.
    """

    tp: Axis
    otp: Axis
    odp: Axis

    def __post_init__(self) -> None:
        """Check the ranks of the groups."""
        tp, otp, width = self.tp, self.otp, self.odp.size
        i, j = tp.rank % width, tp.rank // width
        for axis, rank, ranks in ((otp, j, tp.ranks[i::width]), (self.odp, i, tp.ranks[j * width :][:width])):
            if axis.ranks != ranks or axis.rank != rank:
                raise GroupError(
                    f"FlashComm 2 on rank {tp.rank} of tp {list(tp.ranks)}: expected {axis.name} to be {list(ranks)}, "
                    f"found {list(axis.ranks)}; take both groups of one otp from cpcompile.mesh"
                )
        if tp.layout != "contiguous":
            raise GroupError(f"FlashComm 2: expected rows in one block to a rank, found the layout {tp.layout!r}")


@dataclass(frozen=True)
class Site:
    """One product that FlashComm 2 may compute.

    Args:
        p: the product.
        moves: what moves its rows before they are summed.
        start: the reduce-scatter or all-reduce.
        wait: its wait.
        cuts: nodes that the weight comes through, with the dim of each that has the weight's K.
    """

    p: Product
    moves: tuple[fx.Node, ...]
    start: fx.Node
    wait: fx.Node
    cuts: Cuts

    @property
    def scatters(self) -> bool:
        """Whether the graph reduce-scatters the rows, and does not all-reduce them."""
        return self.start.target is NATIVE.reduce_scatter_tensor.default


class _Refused(Exception):
    """Why a product is left alone, in one line."""


def find_sites(
    gm: fx.GraphModule, products: Sequence[str], groups: FlashGroups, same: Collection[str]
) -> tuple[list[Site], tuple[Refusal, ...]]:
    """The sites of ``products`` in ``gm``, and those that are none, with reasons. Arguments as ``use_flashcomm2``'s."""
    sites: list[Site] = []
    refused: list[Refusal] = []
    nodes = {n.name: n for n in gm.graph.nodes}
    for name in products:
        try:
            site = _site(nodes[name], groups, same)
            _check_apart(site, sites)
            sites.append(site)
        except (_Refused, CutRefused) as reason:
            refused.append(Refusal(name, str(reason)))
    return sites, tuple(refused)


def _site(node: fx.Node, groups: FlashGroups, same: Collection[str]) -> Site:
    if groups.odp.size == 1:
        raise _Refused("otp is all of tp: it would run as it is")
    p = product_of(node)
    if p is None:
        raise _Refused(f"{op_name(node.target) or node.op} is not known as a product of rows and a weight")
    moves, start = _way_to_sum(node, groups.tp)
    wait = only_user(start)
    if wait is None or not is_wait(wait):
        raise _Refused(f"{start} is read by something else than one wait_tensor")
    if start.target is NATIVE.all_reduce.default:
        _check_all_reduced(moves, wait)
    cuts = Cuts(1)
    cuts.cut(p.weight, 0, node)
    cuts.check_readers()
    _check_scales(p, cuts, same)
    if p.bias is not None and not _is_own_input(p.bias, node):
        raise _Refused(f"its bias {p.bias} is no graph input that it alone reads, so that it cannot be added once")
    return Site(p, moves, start, wait, cuts)


def _way_to_sum(node: fx.Node, tp: Axis) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """What moves the rows of the product ``node``, and the reduce-scatter or all-reduce over ``tp`` behind it."""
    moves: list[fx.Node] = []
    while True:
        last = moves[-1] if moves else node
        user = only_user(last)
        if user is None:
            raise _Refused(
                f"{last} is read by {', '.join(map(str, last.users)) or 'nothing'}; expected one sum over tp"
            )
        if user.target in (NATIVE.reduce_scatter_tensor.default, NATIVE.all_reduce.default):
            if arguments(user)["reduce_op"] != "sum" or not tp.owns(group_name_of(user)):
                raise _Refused(f"{user} is no sum over {tp.name}")
            return tuple(moves), user
        reason = RowMoves.refusal(user, last)
        if reason:
            raise _Refused(f"before its sum, {user} {reason}")
        moves.append(user)


def _check_all_reduced(moves: Iterable[fx.Node], wait: fx.Node) -> None:
    odd = next((m for m in moves if not RowMoves.keeps_order(m)), None)
    if odd is not None:
        raise _Refused(f"{odd} moves rows before they are all-reduced")
    if not is_contiguous(wait):
        raise _Refused(f"{wait} is not row-major: its rows do not lead")


def _check_scales(p: Product, cuts: Cuts, same: Collection[str]) -> None:
    """Whatever else the product is computed from is the same for the rows and columns of other ranks."""
    if p.per_row:
        raise _Refused(f"{p.per_row[0]} scales each row by what this rank's columns hold; they would be joined")
    if p.no_sum:
        raise _Refused(p.no_sum)
    others = {n for n in p.node.all_input_nodes if n not in (p.rows, p.weight, p.bias)}
    others |= {n for cut in cuts.nodes for n in cut.all_input_nodes if n not in cuts.nodes}
    varying = next((n for n in sorted(others) if n.name not in same), None)
    if varying is not None:
        raise _Refused(f"{varying} is not known to be the same on all ranks of tp, whose columns it would scale")


def _is_own_input(bias: fx.Node, node: fx.Node) -> bool:
    return bias.op == "placeholder" and set(bias.users) == {node}


def _check_apart(site: Site, others: Iterable[Site]) -> None:
    for other in others:
        shared = next((n for n in site.cuts.nodes if n in other.cuts.nodes), None)
        if shared is not None:
            raise _Refused(f"its weight comes through {shared}, as that of {other.p.node} does")
