"""A framework's own group names: mapped to the axis's group, or the graph is left as it came with the remedy."""

from __future__ import annotations

import dialect_ops  # noqa: F401  registers the stand-ins
import torch
import torch.distributed as dist
from simulate import fake_rank, real_inputs

from cpcompile.backend import exchange_for
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.lowering.targets import lower
from cpcompile.options import Options
from cpcompile.pipeline import compile_graph


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 8, bias=False), torch.nn.Linear(8, 16, bias=False)
        self.next = torch.nn.Linear(16, 4, bias=False)
        self.table = torch.nn.Embedding(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + torch.ops.vllm.all_reduce(self.down(self.up(x)), "tp:0")
        return torch.cumsum(self.next(torch.nn.functional.rms_norm(x, (16,))), 0)


def run(trace: Trace, **options: object) -> Compiled:
    return compile_graph(trace.gm, trace.inputs, Options.parse(options), lambda axis: exchange_for(axis, 5.0))


def traced() -> Trace:
    return capture(Block().eval(), torch.zeros(8, dtype=torch.long))


SHARDED = ("*", "!up.weight", "!down.weight")


def names(compiled: Compiled) -> set[str]:
    """Of all groups in the graph for 8 tokens."""
    known = ("tp:0", compiled.axes[0].group_name)
    return {arg for node in compiled.at(8).gm.graph.nodes for arg in node.args if arg in known}


def test_a_given_axis_adopts_the_frameworks_name() -> None:
    """Under ``aot_compile``, as here, code is made when a graph is changed."""
    ids = torch.arange(8)
    with fake_rank(0, 4) as mesh, torch._dynamo.config.patch(use_lazy_graph_module=False):
        trace = traced()
        compiled = run(trace, axes={"tp": mesh}, replicated=SHARDED, strategy="tp")
        assert [c.decision for c in compiled.report(8).collectives] == ["scatter", "gather"]
        (found,) = lower("eager", compiled.at(8).gm, ())(real_inputs(trace, ids))
    assert names(compiled) == {compiled.axes[0].group_name} and found.shape == (8, 4)


def test_where_nothing_is_worth_a_rewrite_the_frameworks_own_op_stays() -> None:
    """It may be faster on few tokens than PyTorch's. Here a stand-in, which does not run."""
    with fake_rank(0, 4) as mesh:
        compiled = run(traced(), axes={"tp": mesh}, replicated=SHARDED)
    assert [c.decision for c in compiled.report(8).collectives] == ["keep"] and not compiled.refused
    assert names(compiled) == {"tp:0"} and compiled.at(8).gm is compiled.original


def test_a_name_without_a_group_leaves_the_graph_as_it_came() -> None:
    with fake_rank(0, 4):
        trace = traced()
        before = str(trace.gm.graph)
        compiled = run(trace, strategy="tp", replicated=("*",))
    assert not compiled.rewritten and str(compiled.variants[0].gm.graph) == before
    assert compiled.refused == {
        "tp:0": "no process group is called 'tp:0': give axes={name: group} with the name before the colon"
    }
    assert not dist.is_initialized()
