"""Facts about weights follow the weights: which calls compare them again, and what all ranks then run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from simulate import in_threads
from torch import Tensor, nn

from cpcompile.axes import Axis
from cpcompile.errors import AxisError, ParameterChangedError
from cpcompile.exchange import LocalExchange, OfflineExchange
from cpcompile.weight_guard import PATIENCE, PartGuard, WeightGuard

TP, DP = Axis("tp", "tp", 2, 0, (0, 1)), Axis("dp", "dp", 2, 0, (0, 2))


class Rank:
    """One rank's guard over a layer of two weights, of which it compares the first over tp."""

    def __init__(self, exchange: LocalExchange, others: LocalExchange | None = None, last: Axis = DP) -> None:
        self.rank, self.exchanges = exchange.rank, 0
        self.by_axis = {TP: exchange, DP: others}
        self.layer = layer()
        axes: list[tuple[Axis, list[int]]] = [(TP, [1]), *([(DP, [])] if others else [])]
        axes.sort(key=lambda axis: axis[0] is last)
        self.guard = WeightGuard({1: ("norm", self.layer[0])}, axes, self.reach)

    def reach(self, axis: Axis) -> Any:
        self.exchanges += 1
        return self.by_axis[axis]

    def problem(self, *weights: Tensor) -> str:
        return self.guard.problem([None, *(weights or self.layer)])


def layer() -> list[Tensor]:
    return [nn.Parameter(torch.ones(4), requires_grad=False), nn.Parameter(torch.ones(4), requires_grad=False)]


def on_two_ranks(work: Callable[[Rank], Any], timeout_s: float = 10.0) -> list[Any]:
    ring = LocalExchange.ring(2, timeout_s)
    return in_threads(lambda rank: work(Rank(ring[rank])), 2)


def test_weights_as_they_were_exchange_nothing() -> None:
    def work(rank: Rank) -> Any:
        rank.layer[1].add_(rank.rank)  # nothing rests on this one
        return [rank.problem() for _ in range(3)], rank.exchanges

    assert on_two_ranks(work) == [([""] * 3, 0)] * 2


def test_another_layer_is_compared_once() -> None:
    def work(rank: Rank) -> Any:
        second = layer()
        said = [rank.problem(*weights) for weights in (second, rank.layer, second, rank.layer)]
        return said, rank.exchanges

    assert on_two_ranks(work) == [([""] * 4, 1)] * 2


def test_a_layer_that_differs_between_ranks_runs_as_it_came(caplog: pytest.LogCaptureFixture) -> None:
    def work(rank: Rank) -> Any:
        second = layer()
        second[0].mul_(rank.rank)
        return [bool(rank.problem(*weights)) for weights in (second, rank.layer, second)], rank.exchanges

    with caplog.at_level(logging.WARNING, "cpcompile"):
        assert on_two_ranks(work) == [([True, False, True], 1)] * 2
    assert len(caplog.records) == 2  # one on each rank
    line = caplog.records[0].getMessage()
    assert "'norm' differs between the ranks of axis tp: give replicated=[\"!norm\"] and call torch._dynamo" in line


@pytest.mark.parametrize("write", [Tensor.mul_, lambda weight, by: setattr(weight, "data", weight.data * by)])
def test_weights_that_are_written_or_moved_are_compared_again(write: Callable[..., Any]) -> None:
    def work(rank: Rank) -> Any:
        said = []
        for by in (2, 1 + rank.rank, 2 - rank.rank):  # the same; then not; then again
            write(rank.layer[0], by)
            said += [bool(rank.problem()), bool(rank.problem())]
        return said, rank.exchanges

    assert on_two_ranks(work) == [([False, False, True, True, False, False], 3)] * 2


def test_what_changes_at_every_call_is_left_alone_until_it_rests(caplog: pytest.LogCaptureFixture) -> None:
    def work(rank: Rank) -> Any:
        said = []
        for _ in range(PATIENCE + 3):
            rank.layer[0].add_(1)
            said.append(bool(rank.problem()))
        assert said == [False] * PATIENCE + [True] * 3 and rank.exchanges == PATIENCE
        return [rank.problem(), rank.problem()], rank.exchanges

    with caplog.at_level(logging.WARNING, "cpcompile"):
        assert on_two_ranks(work) == [(["", ""], PATIENCE + 1)] * 2
    assert 'if all ranks write the same, give replicated=["norm"]' in caplog.records[0].getMessage()


def test_a_new_tensor_is_not_taken_for_one_that_died() -> None:
    def work(rank: Rank) -> Any:
        known = rank.guard._known
        rank.problem(*layer())
        count = len(known)  # that layer died
        rank.layer = layer()
        return count, len(known), bool(rank.problem()), rank.exchanges

    assert on_two_ranks(work) == [(1, 0, False, 2)] * 2


def test_a_rank_that_sees_a_change_alone_says_so() -> None:
    def work(rank: Rank) -> Any:
        if rank.rank == 0:
            rank.layer[0].add_(0)
        try:
            return rank.problem()
        except AxisError as error:
            rank.exchanges = 0
            with pytest.raises(AxisError):  # nor is it trusted at the next call
                rank.problem()
            return str(error)

    said, other = on_two_ranks(work, timeout_s=0.2)
    assert other == ""
    assert said.startswith("weight 'norm' was written or moved, and is compared again: change weights on all ranks; ")
    assert "ranks [1] did not take part within 0.2 s" in said and "\n" not in said


@pytest.mark.parametrize("last", [TP, DP])
def test_ranks_of_other_axes_hear_of_it(last: Axis) -> None:
    """Ranks 0 and 1 are tp, as are 2 and 3, which hold their weights as they were; 0 and 2 are dp, as are 1 and 3."""
    tp, dp = [LocalExchange.ring(2, 10.0) for _ in range(2)], [LocalExchange.ring(2, 10.0) for _ in range(2)]

    def work(number: int) -> str:
        replica, rank = divmod(number, 2)
        mine = Rank(tp[replica][rank], dp[rank][replica], last)
        mine.layer[0].add_(1 if number != 1 else 2)
        return mine.problem()

    said = in_threads(work, 4)
    assert said[0] and said == [said[0]] * 4


def test_inference_tensors_are_watched_by_their_address() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
        guard = WeightGuard({0: ("x", weight)}, [(TP, [0])], lambda axis: OfflineExchange(2))
        weight.add_(1)
        assert guard.problem([weight]) == ""
        state = next(iter(guard._known.values())).state
        weight.set_(torch.zeros(3))
        assert guard.problem([weight]) == "" and next(iter(guard._known.values())).state != state


def test_a_look_at_many_weights_is_cheap() -> None:
    """Measured 0.1 ms for 1,000 weights; a copy of one would take longer."""
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(1000)]
    guard = WeightGuard({i: ("w", w) for i, w in enumerate(weights)}, [(TP, range(1000))], _nobody)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        assert guard.problem(weights) == ""
        took.append(time.perf_counter() - start)
    assert min(took) < 0.003


def _nobody(axis: Axis) -> Any:
    raise AssertionError("nothing was to be exchanged")


# ---- parts


def guarded() -> tuple[nn.Linear, PartGuard]:
    linear = nn.Linear(4, 4)
    return linear, PartGuard(linear.named_parameters())


def test_parts_are_not_for_weights_that_were_replaced_or_written() -> None:
    linear, guard = guarded()
    guard.check(list(linear.parameters()))
    with torch.no_grad():
        linear.bias.fill_(1.0)
    with pytest.raises(ParameterChangedError, match=r"'bias'.*written; call torch._dynamo.reset\(\)"):
        guard.check(list(linear.parameters()))
    linear, guard = guarded()
    linear.weight.data = torch.zeros(4, 4)
    with pytest.raises(ParameterChangedError, match=r"'weight'.*other memory"):
        guard.check(list(linear.parameters()))
    linear, guard = guarded()
    old, linear.weight = linear.weight, nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ParameterChangedError, match=r"'weight'.*other memory"):
        guard.check(list(linear.parameters()))
    guard.check([old, linear.bias])
    del old  # held weakly
    with pytest.raises(ParameterChangedError, match=r"'weight'.*replaced"):
        guard.check(list(linear.parameters()))


def test_parts_are_not_for_a_new_weight_at_the_old_address() -> None:
    memory = torch.zeros(16)
    parameter = nn.Parameter(memory.view(4, 4))
    guard = PartGuard([("w", parameter)])
    guard.check([parameter])
    parameter = nn.Parameter(memory.view(4, 4))
    with pytest.raises(ParameterChangedError, match=r"'w'.*replaced"):
        guard.check([parameter])


def test_parts_watch_the_address_of_inference_tensors() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
        guard = PartGuard([("x", weight)])
        weight.add_(1)
        guard.check([weight])
        weight.set_(torch.zeros(3))
        with pytest.raises(ParameterChangedError, match="other memory"):
            guard.check([weight])


def test_a_compiled_call_is_given_the_parameters_themselves() -> None:
    """Guards tell weights by their tensors: dynamo and AOTAutograd have to pass the module's own."""
    linear, seen = nn.Linear(4, 4, bias=False), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        from cpcompile.capture import lower_inference

        def inference(aot: torch.fx.GraphModule, _: Any) -> Any:
            def call(args: list[Any]) -> Any:
                seen.append([id(arg) for arg in args])
                return aot.forward(*args)

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        return lower_inference(gm, example_inputs, inference, inference)

    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            compiled(torch.ones(2, 4))
            assert id(linear.weight) in seen[-1]
            linear.weight = nn.Parameter(torch.zeros(4, 4))
    assert len(seen) == 2
