"""Code that ``aot_compile`` saved runs again on two real gloo ranks if both can take it, and on none otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from blocks import VOCAB, Block, Spelling
from gloo_ranks import in_turn, joined

from cpcompile import identity
from cpcompile.errors import AxisError
from cpcompile.plan import Plan
from cpcompile.reload import NOTHING, settle
from cpcompile.run_code import group_names
from cpcompile.saved_code import SavedCode

WORLD, TOLERANCE = 2, 2e-5
TOKENS = (9, 2, 1 << 16)
# Small steps stay as they are with this profile, larger ones are rewritten: one graph, several variants.
OPTIONS = {"profile": "ascend-a3"}


class Ranks:
    """One rank's side of a scenario: a group that is new each time, the model over it, and files."""

    def __init__(self, folder: Path) -> None:
        self.rank, self.folder = dist.get_rank(), folder
        self.group = dist.new_group(range(WORLD))
        self.model = Block(Spelling(all_reduce=over_group), self.group, self.rank, WORLD)

    def options(self, **more: Any) -> dict[str, Any]:
        return {**OPTIONS, "axes": {"tp": self.group}, **more}

    def compile(self, **more: Any) -> Any:
        torch._dynamo.reset()
        with torch.no_grad(), torch._dynamo.config.patch(enable_aot_compile=True):
            compiled = torch.compile(
                self.model.forward,
                backend="cpcompile",
                options={**self.options(**more), "guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
                fullgraph=True,
            )
            return compiled.aot_compile(((ids_of(9),), {}))

    def save(self, name: str = "code", **more: Any) -> None:
        self.compile(**more).save_compiled_function(str(self.file(name)))
        dist.barrier()

    def file(self, name: str = "code") -> Path:
        return self.folder / f"{name}.{self.rank}"

    def load(self, name: str = "code") -> tuple[Any, SavedCode]:
        with self.file(name).open("rb") as file:
            loaded = torch.compiler.load_compiled_function(file, f_globals=Block.forward.__globals__)
        loaded.disable_guard_check()
        return loaded, loaded._artifacts.compiled_fn

    def settled(self, found: SavedCode | None, **more: Any) -> str:
        """The verdict, which is the same on both ranks."""
        verdict = settle(found, self.model, self.options(**more))
        said: list[Any] = [None] * WORLD
        dist.all_gather_object(said, verdict)
        assert said[0] == said[1]
        return verdict

    @torch.no_grad()
    def is_right(self, call: Any, whole: Block | None = None) -> None:
        whole = whole or Block()
        for tokens in TOKENS:
            found, expected = call(self.model, ids_of(tokens)), whole(ids_of(tokens))
            assert (found - expected).norm() <= TOLERANCE * expected.norm()


def over_group(x: torch.Tensor, group: Any) -> torch.Tensor:
    dist.all_reduce(x, group=group)
    return x


def ids_of(tokens: int) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    torch._dynamo.mark_dynamic(ids, 1)
    return ids


@contextmanager
def version(name: str) -> Iterator[None]:
    with mock.patch.object(identity, "our_version", lambda: name):
        yield


def taken_again(first: Ranks) -> None:
    """Over a group of another name, every variant, with the numbers of the whole model; saved again it is as good."""
    compiled = first.compile()
    first.is_right(compiled)
    compiled.save_compiled_function(str(first.file()))
    now = Ranks(first.folder)
    loaded, found = now.load()
    with pytest.raises(Exception, match="runs only after the ranks compared it"):
        loaded(now.model, ids_of(9))
    assert now.settled(found) == ""
    now.is_right(loaded)
    assert found._code is not None and len({id(gm) for gm in found._code.graphs}) > 1
    assert {name for gm in found._code.graphs for name in group_names(gm)} == {now.group.group_name}
    assert any("all-reduces rewritten" in line for line in found.grounds.done)
    loaded.save_compiled_function(str(now.file("again")))
    loaded, found = now.load("again")
    assert now.settled(found) == ""
    now.is_right(loaded)


@torch.no_grad()
def weights_are_compared_again(first: Ranks) -> None:
    """Other weights that are the same on both ranks are as good, then and later; else the graph runs as it came."""
    ranks, whole = Ranks(first.folder), Block()
    for model in (ranks.model, whole):
        model.layers[0].norm1.fill_(2.0)
    loaded, found = ranks.load()
    assert ranks.settled(found) == ""
    ranks.is_right(loaded, whole)
    for model in (ranks.model, whole):
        model.layers[0].norm1.mul_(2)
    ranks.is_right(loaded, whole)
    code = found._code
    assert code is not None and code.original is not None
    for norm in (ranks.model.layers[0].norm1, ranks.model.layers[0].norm2):  # read before they are summed over ranks
        norm.mul_(1 + ranks.rank)
    with mock.patch.object(code, "run", []):
        loaded(ranks.model, ids_of(9))
    _, found = ranks.load()
    ranks.model.layers[0].norm1.fill_(2.0 + ranks.rank)
    assert ranks.settled(found) == "weight layers.0.norm1 is no longer the same on all ranks of axis tp"
    # A shard of tensor parallelism differs between the ranks by design, and nothing rests on it.
    ranks = Ranks(first.folder)
    ranks.model.layers[0].out.add_(ranks.rank)
    assert ranks.settled(ranks.load()[1]) == ""


def refused_by_all(ranks: Ranks) -> None:
    """Whatever one rank finds wrong with its code, both hear of it."""

    def found() -> SavedCode:
        return ranks.load()[1]

    def on_rank_1(other: SavedCode | None) -> SavedCode | None:
        return other if ranks.rank == 1 else found()

    damaged, renamed, wide = found(), found(), found()
    damaged._pickled = b"nothing"
    renamed.grounds.weights["absent"] = renamed.grounds.weights.pop("table")
    wide.grounds.weights["table"] = "torch.float32[1, 2]"
    ranks.save("later")
    later = ranks.load("later")[1]
    saying = "rank 1 of axis tp: saved code "
    assert ranks.settled(None) == NOTHING
    assert ranks.settled(on_rank_1(None)) == "rank 1 of axis tp: no saved code"
    assert ranks.settled(on_rank_1(damaged)).startswith(saying + "cannot be read: UnpicklingError")
    assert ranks.settled(on_rank_1(renamed)) == saying + "is of another model: there is no weight absent"
    assert ranks.settled(on_rank_1(wide)).startswith(
        saying + "is of another model: weight table was torch.float32[1, 2]"
    )
    assert ranks.settled(on_rank_1(later)) == "the ranks of axis tp have code of different compilations"


def refused_for_what_it_was_made_with(ranks: Ranks) -> None:
    """Other options, another plan, another version of ours, other ranks: said by name."""
    said = "rank 0 of axis tp: saved code is of other options or versions: "
    _, found = ranks.load()
    assert ranks.settled(found, strategy="tp") == said + "option strategy was 'auto' and is 'tp'"
    plan = ranks.folder / f"plan{ranks.rank}.json"
    Plan().save(plan)
    assert ranks.settled(found, plan=str(plan)).startswith(said + "option plan was none and is ")
    with version("0.0.1"):
        assert ranks.settled(found).startswith(said + "cpcompile was ")
    found.grounds.axes = []
    told = "saved code is for the axes none, not tp of ranks [0, 1], rank 0"
    assert ranks.settled(found) == f"rank 0 of axis tp: {told}"


def not_saved(ranks: Ranks) -> None:
    """Code that cannot be kept runs, and says why it is not saved."""
    compiled = ranks.compile(strategy="off")
    ranks.is_right(compiled)
    with pytest.raises(Exception, match="not saved: axis tp is left alone: strategy='off'; the next start tries again"):
        compiled.save_compiled_function(str(ranks.file("unsaved")))
    unsaved = ranks.file("unsaved")
    assert not unsaved.exists() or not unsaved.stat().st_size  # torch 2.11 opens it first


def absent_rank(ranks: Ranks) -> None:
    """The last scenario: the ranks' turns differ from here on."""
    if ranks.rank == 0:
        with pytest.raises(AxisError, match=r"exchange of 'saved code' .* ranks \[1\] did not take part within 1 s"):
            settle(ranks.load()[1], ranks.model, ranks.options(timeout_s=1))
    dist.barrier()


SCENARIOS: list[Callable[[Ranks], None]] = [
    taken_again,
    weights_are_compared_again,
    refused_by_all,
    refused_for_what_it_was_made_with,
    not_saved,
    absent_rank,
]


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder, caches=True):
        in_turn(SCENARIOS, Ranks(Path(folder)))


@pytest.mark.ranks
def test_two_ranks(tmp_path: Path) -> None:
    """One spawn for all scenarios."""
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
