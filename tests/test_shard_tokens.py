import pytest
import torch

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.errors import AxisError, OptionError, TraceError, VerificationError
from cpcompile.model_spec import fake_mesh
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.context import context_of
from cpcompile.passes.shard_tokens import ShardTokens
from cpcompile.passes.verify_rewrite import VerifyRewrite
from cpcompile.trace_file import load_trace, save_trace
from tests.toy_models import no_mesh, toy

SHARD = ShardTokens(tokens=65536)
C10D = torch.ops._c10d_functional


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "toy.pt2"
    with fake_mesh({"tp": 4}, 0) as mesh:
        model, args = toy(mesh)
        save_trace(path, capture(model, *args), [axis_of("tp", mesh["tp"])])
    return path


@pytest.fixture
def gm(saved):
    found = load_trace(saved).trace.gm
    Canonicalise()(found)
    return found


def count(gm, op) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=op.default))


def test_all_reduces_become_scatters_and_gathers_in_place(gm):
    graph = gm.graph
    assert (count(gm, C10D.all_reduce), count(gm, C10D.reduce_scatter_tensor)) == (2, 0)
    result = SHARD(gm)
    assert gm.graph is not graph
    assert (count(gm, C10D.all_reduce), count(gm, C10D.reduce_scatter_tensor)) == (0, 2)
    gathers = count(gm, C10D.all_gather_into_tensor)
    assert gathers == 2
    assert result.rewrites >= 2 and result.refusals == []
    assert "reduce_scatter_tensor" in gm.code


def test_the_rewrite_can_be_proven(gm):
    SHARD(gm)
    assert VerifyRewrite()(gm).refusals == []
    assert count(context_of(gm).rewrite.before, C10D.all_reduce) == 2


def test_a_wrong_graph_cannot_be_proven(gm):
    SHARD(gm)
    add = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor and "s" in str(n.meta["val"].shape))
    add.target = torch.ops.aten.sub.Tensor
    with pytest.raises(VerificationError, match="axis tp: not proven at"):
        VerifyRewrite()(gm)


def test_nothing_is_proven_before_a_rewrite(gm):
    result = VerifyRewrite()(gm)
    assert "nothing to prove" in result.refusals[0].reason


def test_a_second_run_rewrites_nothing(gm):
    SHARD(gm)
    code, before = gm.code, context_of(gm).rewrite
    again = SHARD(gm)
    assert again.rewrites == 0
    assert gm.code == code and context_of(gm).rewrite is before
    assert again.refusals[0].reason == "no sum all-reduce of axis 'tp' carries tokens"


def test_a_small_step_is_left_alone_with_a_reason_for_each(gm):
    code = gm.code
    result = ShardTokens(tokens=1)(gm)
    assert result.rewrites == 0 and gm.code == code
    assert len(result.refusals) == 2
    assert all("one all-reduce is cheaper" in refusal.reason for refusal in result.refusals)


def test_strategy_tp_shards_a_small_step(gm):
    assert ShardTokens(tokens=1, strategy="tp")(gm).rewrites > 0


def test_a_graph_without_all_reduces(tmp_path):
    model, args = no_mesh()
    with fake_mesh({"tp": 2}, 0) as mesh:
        save_trace(tmp_path / "x.pt2", capture(model, *args), [axis_of("tp", mesh["tp"])])
    result = SHARD(load_trace(tmp_path / "x.pt2").trace.gm)
    assert [r.reason for r in result.refusals] == ["no sum all-reduce of axis 'tp' carries tokens"]


def test_errors(gm):
    with pytest.raises(AxisError, match=r"no axis 'tpp' \(did you mean 'tp'\?\)"):
        ShardTokens(axis="tpp")(gm)
    with pytest.raises(OptionError, match="did you mean 'ascend-a3'"):
        ShardTokens(profile="ascend-a33")(gm)
    gm.meta.clear()
    with pytest.raises(TraceError, match="no axes and facts"):
        SHARD(gm)
