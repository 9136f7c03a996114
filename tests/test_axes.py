"""Mesh axes: what a process group is to this rank, which groups of a graph become axes, and what a mistake says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.axes import Axis, axis_of, find_axes, is_group, resolve_group
from cpcompile.errors import AxisError

RANK = 4  # of a mesh dp=2, tp=3: row 1, column 1


@pytest.fixture(autouse=True, scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=6)
    yield init_device_mesh("cpu", (2, 3), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def group_name(mesh: DeviceMesh) -> str:
    return mesh.get_group().group_name


# ---- one axis ------------------------------------------------------------------------------------------------------


def test_a_dim_of_a_mesh_its_group_and_its_groups_name_are_one_axis(mesh: DeviceMesh) -> None:
    expected = Axis("tp", group_name(mesh["tp"]), 3, 1, (3, 4, 5))
    for group in (mesh["tp"], mesh["tp"].get_group(), group_name(mesh["tp"])):
        assert axis_of("tp", group) == expected
    assert axis_of("x", mesh["dp"]) == Axis("x", group_name(mesh["dp"]), 2, 1, (1, 4))


def test_rank_is_the_place_in_the_group_and_not_in_the_world() -> None:
    axis = axis_of("tp", dist.new_group([2, 4]))
    assert (axis.size, axis.rank, axis.ranks) == (2, 1, (2, 4))


def test_an_axis_owns_its_own_group_only(mesh: DeviceMesh) -> None:
    axis = axis_of("tp", mesh["tp"])
    assert axis.owns(group_name(mesh["tp"]))
    assert not axis.owns(group_name(mesh["dp"])) and not axis.owns(None)


def test_names_of_groups(mesh: DeviceMesh) -> None:
    assert is_group(group_name(mesh["tp"])) and not is_group("tp:0")
    assert resolve_group(group_name(mesh["tp"])) == mesh["tp"].get_group()


KINDS = "give a ProcessGroup, a DeviceMesh of one dim, or a name"
NOT_IN = "rank 4 is not in its group{}; give the group that this rank is in"


def refused(name: str, group: object) -> str:
    with pytest.raises(AxisError) as caught:
        axis_of(name, group)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mistake_says_what_to_give(mesh: DeviceMesh) -> None:
    dims = "the mesh has 2 dims, named ('dp', 'tp'); give one of them"
    assert refused("tp", mesh) == f"axis 'tp': {dims}: mesh['tp']"
    assert refused("tensor", mesh) == f"axis 'tensor': {dims}: mesh.get_group(dim)"
    nameless = DeviceMesh("cpu", [[0, 1, 2], [3, 4, 5]])
    assert refused("tp", nameless).endswith("2 dims, named None; give one of them: mesh.get_group(dim)")
    assert refused("tp", "nope") == "axis 'tp': no process group is called 'nope'; give the ProcessGroup itself"
    assert refused("tp", 4) == f"axis 'tp' is int: {KINDS}"
    assert refused("tp", None) == f"axis 'tp' is NoneType: {KINDS}"


def test_a_rank_outside_the_group() -> None:
    """Ranks that a group leaves out hold torch's placeholder for it, or a mesh without a coordinate."""
    assert refused("tp", dist.new_group([0, 1])) == "axis 'tp': " + NOT_IN.format("")
    assert refused("tp", DeviceMesh("cpu", [0, 1])) == "axis 'tp': " + NOT_IN.format(" [0, 1]")


# ---- the axes of a graph -------------------------------------------------------------------------------------------


def test_given_axes_are_taken_in_their_order_whatever_the_graph_reduces_over(mesh: DeviceMesh) -> None:
    axes = find_axes(["nope"], {"b": mesh["tp"], "a": mesh["dp"]}, [mesh])
    assert [(a.name, a.ranks) for a in axes] == [("b", (3, 4, 5)), ("a", (1, 4))]


def test_two_given_axes_over_the_same_ranks(mesh: DeviceMesh) -> None:
    with pytest.raises(AxisError) as caught:
        find_axes([], {"tp": mesh["tp"], "dp": mesh["dp"], "ep": dist.new_group([3, 4, 5])})
    assert str(caught.value) == "axes 'tp' and 'ep' have the same ranks [3, 4, 5]: give one"


def test_axes_are_found_in_the_graphs_order_and_each_once(mesh: DeviceMesh) -> None:
    tp, dp = group_name(mesh["tp"]), group_name(mesh["dp"])
    assert [a.group_name for a in find_axes([tp, dp, tp], {})] == [tp, dp]
    assert [a.group_name for a in find_axes([dp, tp], {})] == [dp, tp]


def test_without_a_mesh_among_the_inputs_an_axis_has_a_name_that_all_ranks_share(mesh: DeviceMesh) -> None:
    """A group's own name is another one on other ranks: there, the mesh dim that it was made for, or its place."""
    groups = [group_name(mesh["tp"]), dist.new_group([0, 4]).group_name, group_name(mesh["dp"])]
    assert [a.name for a in find_axes(groups, {})] == ["tp", "1", "dp"]


def test_an_axis_is_called_after_the_mesh_dim_with_its_ranks(mesh: DeviceMesh) -> None:
    tp, dp = group_name(mesh["tp"]), group_name(mesh["dp"])
    other = dist.new_group([0, 4])
    axes = find_axes([tp, dp, other.group_name], {}, [DeviceMesh("cpu", [3, 4, 5]), mesh])
    assert [(a.name, a.group_name) for a in axes] == [("tp", tp), ("dp", dp), ("2", other.group_name)]


@pytest.mark.parametrize("ranks", [[3, 4, 5], [5, 3, 4]], ids=str)
def test_two_groups_over_the_same_ranks_are_one_axis(mesh: DeviceMesh, ranks: list[int]) -> None:
    tp, second = group_name(mesh["tp"]), dist.new_group(ranks).group_name
    assert [(a.name, a.group_name) for a in find_axes([tp, second], {}, [mesh])] == [("tp", tp)]


def test_a_dim_of_a_mesh_knows_the_rank_lists_of_all_its_dims(mesh: DeviceMesh) -> None:
    axis = axis_of("tp", mesh["tp"])
    assert axis.groups == {
        group_name(mesh["tp"]): ((0, 1, 2), (3, 4, 5)),
        group_name(mesh["dp"]): ((0, 3), (1, 4), (2, 5)),
    }
    assert axis.members(group_name(mesh["dp"]), 2) == (2, 5) and axis.members("another", 2) is None


def test_of_a_group_alone_its_own_ranks_are_known(mesh: DeviceMesh) -> None:
    axis = axis_of("tp", mesh["tp"].get_group())
    assert axis.groups == {} and axis.members(axis.group_name, 5) == (3, 4, 5)
    assert axis.members(axis.group_name, 0) is None and axis.members(group_name(mesh["dp"]), RANK) is None


def test_a_mesh_that_this_rank_is_not_in_names_nothing(mesh: DeviceMesh) -> None:
    tp = group_name(mesh["tp"])
    elsewhere = DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("far",))
    assert [a.name for a in find_axes([tp], {}, [elsewhere, mesh])] == ["tp"]


def test_groups_of_one_rank_and_unknown_groups_are_no_axes(mesh: DeviceMesh) -> None:
    alone = dist.new_group([RANK]).group_name
    assert [a.name for a in find_axes([alone, "tp:0", group_name(mesh["tp"])], {}, [mesh])] == ["tp"]
    assert find_axes([], {}, [mesh]) == []
