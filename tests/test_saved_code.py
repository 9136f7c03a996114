"""What compiled code is not saved, and what is compared when it is read; ``run/test_reload_gloo`` has real ranks."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.fx as fx
from simulate import fake_rank

from cpcompile import identity
from cpcompile.axes import axis_of
from cpcompile.compiled import Compiled, Variant
from cpcompile.exchange import OfflineExchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.options import Options
from cpcompile.plan import Plan
from cpcompile.run_code import RunCode, group_names, rename_groups
from cpcompile.saved_code import Grounds, compiled_once, grounds_of

ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default


def summed(group: str, *, by_keyword: bool = False) -> fx.GraphModule:
    """The sum of an input over ``group``, times the input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    where: tuple[tuple[Any, ...], dict[str, Any]] = ((), {"group_name": group}) if by_keyword else ((group,), {})
    total = graph.call_function(ALL_REDUCE, (x, "sum", *where[0]), where[1])
    done = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (total,))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (done, x)),))
    return fx.GraphModule({}, graph)


def found(gm: fx.GraphModule, target: str = "eager", **changes: Any) -> Grounds:
    with fake_rank(0, 2) as mesh:
        axis = axis_of("tp", mesh)
        compiled = Compiled(gm, [Variant(0, None, gm)], Plan(), axes=[axis])
        inputs = changes.pop("inputs", [GraphInput("x", torch.ones(2), "input")])
        for name, value in changes.items():
            setattr(compiled, name, value)
        return grounds_of(compiled, inputs, Options(), target, lambda axis: OfflineExchange(2), [])


def group_of_the_axis() -> str:
    with fake_rank(0, 2) as mesh:
        return axis_of("tp", mesh).group_name


def test_what_is_saved_knows_the_axis_and_a_word_of_its_own() -> None:
    gm = summed(group_of_the_axis())
    first, second = found(gm), found(gm)
    assert not first.refusal and [axis.name for axis in first.axes] == ["tp"]
    assert first.words["tp"] != second.words["tp"]


def test_what_is_not_saved_has_a_reason() -> None:
    gm = summed(group_of_the_axis())
    assert found(gm, "inductor").refusal.startswith("code of target 'inductor' is not kept")
    assert (
        found(gm, refused={"tp": "no tokens"}).refusal == "axis tp is left alone: no tokens; the next start tries again"
    )
    assert found(gm, sharing=SimpleNamespace(recipes={"x": ()})).refusal.startswith("parts of weights that ranks share")
    constant = copy.deepcopy(gm)
    constant.table = torch.ones(2)
    assert found(constant).refusal.startswith("the graph holds tensors of its own")


def test_collectives_over_a_group_that_is_no_axis_are_not_saved() -> None:
    """A framework's own name, with a colon, is its own to find again."""
    with fake_rank(0, 2):
        other = torch.distributed.new_group([0, 1]).group_name
        assert found_inside(summed(other)) == f"the graph has collectives over group {other!r}, which is no axis"
        assert found_inside(summed("tp:0")) == ""


def found_inside(gm: fx.GraphModule) -> str:
    compiled = Compiled(gm, [Variant(0, None, gm)], Plan())
    return grounds_of(compiled, [], Options(), "eager", lambda axis: OfflineExchange(2), []).refusal


@pytest.mark.parametrize("by_keyword", [False, True])
def test_groups_get_the_names_that_they_have_now(by_keyword: bool) -> None:
    """Also in a graph within the graph, and where names change places."""
    outer = summed("1", by_keyword=by_keyword)
    outer.add_module("inner", summed("2", by_keyword=by_keyword))
    rename_groups(outer, {"1": "2", "2": "1"})
    assert group_names(outer.inner) == {"1"} and "'2'" in outer.code and "'1'" in outer.inner.code  # type: ignore[arg-type]


def test_a_graph_that_cannot_be_pickled_still_runs() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(open, (graph.placeholder("x"),)),))
    code = RunCode([lambda args: [1]], [0], None, lambda args: True, None, [fx.GraphModule({}, graph)])
    kept = copy.copy(code)
    kept.prepare_for_serialization()
    assert kept.failure and not kept.pickled
    assert code([0]) == [1]


def test_pytorchs_own_cache_has_another_key_each_time() -> None:
    """It knows nothing of other ranks: if it answered on one alone, the other would wait."""
    tags = []
    for _ in range(2):
        with compiled_once():
            tags.append(torch.compiler.config.cache_key_tag)
    assert all(tags) and tags[0] != tags[1] and not torch.compiler.config.cache_key_tag


def test_the_variant_for_the_tokens_of_a_call_runs_or_the_graph_as_it_came() -> None:
    variants = [lambda args: "few", lambda args: "many"]
    code = RunCode(variants, [0, 10], lambda args: args[0], lambda args: args[1], lambda args: "as it came", [])
    assert [code([tokens, True]) for tokens in (0, 9, 10, 11)] == ["few", "few", "many", "many"]
    assert [code([tokens, False]) for tokens in (0, 11)] == ["as it came"] * 2


def test_what_differs_is_named() -> None:
    one, other = identity.identity(Options()), identity.identity(Options(strategy="tp"))
    assert identity.difference(one, dict(one)) == ""
    assert identity.difference(one, other) == "option strategy was 'auto' and is 'tp'"
    assert identity.identity(Options(timeout_s=1.0, dump_dir="x", axes={"tp": 1})) == one
    plans = {identity.identity(Options(plan=plan))["option plan"] for plan in (None, Plan())}
    assert len(plans) == 2 and "none" in plans
