"""Whether spreading a module over a group of its own pays: bytes and seconds without and with it, and the criterion."""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.costs import HardwareProfile
from cpcompile.layer_costs import Collective, Work

CAUTION = 1.7
"""How much slower than computed collectives may be: as those of the one published row that timed them alone.

SGLang #10568 measured 249.63 ms where :mod:`cpcompile.layer_costs` has 146.7 (docs/CALIBRATION.md). A gain that is gone
at links this slow is no gain to count on.
"""

WORTH = 0.1e-3
"""Seconds per step that a freed GB (1e9 bytes) is worth at the least; more than that, and it pays for memory alone.

Freed bytes carry more requests. A request of DeepSeek-R1 at its full context, 163,840 tokens, caches 11.5 GB; so a GB
is 0.36 % of a batch of 24 such requests, and 0.36 % of a step of 30 ms is 0.1 ms. With shorter contexts, and where
memory is what limits the batch, a GB is worth more: bytes and ms are reported apart, for a user to judge.
"""


@dataclass(frozen=True)
class Side:
    """One layer, without or with the group: bytes of weights on a rank in all layers; work and collectives of one."""

    weights: float
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...] = ()


@dataclass(frozen=True)
class ModuleCost:
    """A module on one rank, without and with its group.

    Args:
        module: a key of :data:`cpcompile.module_costs.MODULES`.
        ranks: P, the size of the group.
        tp: ranks that cut the weights without it.
        tokens: B, rows that each rank brings.
        layers: how many layers have the module.
        before: without the group.
        after: with it.
        buffers: bytes that the group needs besides: rows gathered and results not yet scattered, weights under way.
        cover: seconds of each layer during which its collectives run for free.
        profile: the machine.
    """

    module: str
    ranks: int
    tp: int
    tokens: int
    layers: int
    before: Side
    after: Side
    buffers: float
    cover: float
    profile: HardwareProfile

    @property
    def saved(self) -> float:
        """Bytes of weights that each rank no longer holds; negative where it holds more."""
        return self.before.weights - self.after.weights

    @property
    def freed(self) -> float:
        """Bytes that each rank has more of for other things: weights saved, less buffers."""
        return self.saved - self.buffers

    def seconds(self, side: Side, slower: float = 1.0) -> float:
        """Seconds per step of ``side``, with collectives ``slower`` times as slow as computed."""
        moved = slower * sum(c.seconds(self.profile) for c in side.collectives)
        return self.layers * (sum(w.seconds(self.profile) for w in side.work) + max(0.0, moved - self.cover))

    def change(self, slower: float = 1.0) -> float:
        """Seconds per step that the group adds; negative where it saves."""
        return self.seconds(self.after, slower) - self.seconds(self.before, slower)

    @property
    def cautious(self) -> float:
        """The worse :meth:`change` of collectives as computed and :data:`CAUTION` times as slow."""
        return max(self.change(), self.change(CAUTION))

    @property
    def pays(self) -> bool:
        """Whether the group is worth it: the criterion, in one place. See :data:`CAUTION` and :data:`WORTH`."""
        return self.cautious < WORTH * self.freed / 1e9

    @property
    def reason(self) -> str:
        """The verdict in one sentence."""
        change, cautious, freed = self.change() * 1e3, self.cautious * 1e3, self.freed
        frees = f"{'frees' if freed > 0 else 'takes'} {abs(freed) / 1e9:.2f} GB per rank"
        if freed <= 0:
            takes = f"may cost {cautious:.2f}" if cautious >= 0 else f"saves {-cautious:.2f}"
            return f"{frees} and {takes} ms per step"
        price = f"{cautious / freed * 1e9:.2f} ms per GB"
        if self.pays and cautious < 0:
            return f"saves {-change:.2f} ms per step, {-cautious:.2f} on slow links, and {frees}"
        if self.pays:
            return f"{frees} for {cautious:.2f} ms per step at the most, {price}"
        text = f"{frees} but may cost {cautious:.2f} ms per step, {price}: only for memory"
        gone = f"; the {-change:.2f} ms that it saves as computed are gone on links {self.slack:.1f} times as slow"
        return text + (gone if change < 0 else "")

    @property
    def slack(self) -> float:
        """How many times as slow as computed collectives may be before a computed gain is gone."""
        added = self.change(2.0) - self.change()
        return 1 - self.change() / added if added > 0 else float("inf")
