"""Every form of MLP on two real gloo ranks through torch.compile: shared, or it alone stays whole; the numbers right.

And what fails in one module (its proof on one rank, its cut, its search) leaves the others shared on all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from gloo_ranks import in_turn, joined
from module_forms import FORMS, VOCAB, Form, build

from cpcompile import module_sharing, share_weights
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.mesh.process_groups import ProcessGroups
from cpcompile.passes import module_inner, module_roles
from cpcompile.passes.verify_proof import Failure

WORLD, TOLERANCE = 2, 1e-5
ROLES = {"embedding": "embedding", "mlp": "mlp", "lmhead": "lm_head"}
AGAIN = ("chunk", "interleaved", "ungated", "reversed")  # with other numbers of tokens, which is another graph
SHARED = {"embedding": "shared", "mlp": "shared", "lm_head": "shared"}


class Decisions(logging.Handler):
    """Role → ``shared``, or why it stays whole, as the log tells a user; of the last graph."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("cpcompile: shared: "):
            self.told[message.split()[3]] = "shared"
        elif " stays whole: " in message:
            self.told[message.split()[1]] = message.partition(" stays whole: ")[2]


def run(form: Form, groups: ProcessGroups, rank: int, calls: int, **others: Any) -> dict[str, str]:
    """Compile and call a model, each rank with tokens of its own; what became of its modules."""
    torch._dynamo.reset()
    sizes = {f"{name}_tensor_parallel_size": WORLD for name in ROLES}
    options = {"groups": groups, "finegrained_tp_config": sizes, "timeout_s": 120, **others}
    model = build(form)
    compiled, told = torch.compile(model, backend="cpcompile", options=options, fullgraph=True), Decisions()
    log = logging.getLogger("cpcompile")
    log.addHandler(told)
    for tokens in [(5, 3), (4, 9)][:calls]:
        ids = torch.randint(0, VOCAB, (tokens[rank],), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            found, expected = compiled(ids), model(ids)
        assert (found - expected).norm() <= TOLERANCE * expected.norm(), (told.told, tokens)
    log.removeHandler(told)
    return told.told


def every_form(rank: int, groups: ProcessGroups) -> None:
    for name, form in FORMS.items():
        for verify in ("static", "off")[: 1 + form.shared]:
            told = run(form, groups, rank, 1 + (name in AGAIN and verify == "static"), verify=verify)
            alone = {**SHARED, "mlp": told["mlp"]}
            assert told == alone and (told["mlp"] == "shared") == form.shared, (name, verify, told)


@contextmanager
def _raising(owner: Any, name: str, when: Callable[..., bool]) -> Iterator[None]:
    """``owner.name`` raises where ``when`` its arguments say so."""
    real = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise KeyError("seeded")
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, broken):
        yield


@contextmanager
def _not_proven_on_rank_1(rank: int) -> Iterator[None]:
    """The proof of the graph fails where the MLP activates, as long as the MLP is shared."""
    real = share_weights.prove_modules

    def proven(old: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        proof = real(old, new, *args, **kwargs)
        inner = next(n for n in new.graph.nodes if "gelu" in str(n.target))
        if rank != 1 or len(kwargs["equal"]) or inner.meta["val"].shape[-1] == inner_width():
            return proof
        return type(proof)(False, (Failure(inner.name, "seeded"),), proof.facts)

    def inner_width() -> int:
        return FORMS["ungated"].widths[0]

    with mock.patch.object(share_weights, "prove_modules", proven):
        yield


def one_failure_leaves_the_others_shared(rank: int, groups: ProcessGroups) -> None:
    form = FORMS["ungated"]
    seeded = {
        "not proven: seeded": _not_proven_on_rank_1(rank),
        "KeyError: 'seeded'": _raising(module_sharing, "cuts_of", lambda gm, module: module.role == "mlp"),
        "KeyError: 'seeded' ": _raising(module_inner.InnerValues, "copy", lambda *_: True),
    }
    assert run(form, groups, rank, 1) == SHARED
    for reason, broken in seeded.items():
        with broken:
            assert run(form, groups, rank, 1) == {**SHARED, "mlp": reason.strip()}, reason
    with _raising(module_roles._Graph, "embeddings", lambda *_: True):
        reason = "no module of this graph was found to be one: KeyError: 'seeded'"
        assert run(form, groups, rank, 1) == {**SHARED, "embedding": reason}


SCENARIOS = [every_form, one_failure_leaves_the_others_shared]


def run_rank(rank: int, folder: str) -> None:
    logging.getLogger("cpcompile").setLevel(logging.INFO)
    with joined(rank, WORLD, folder):
        groups = ProcessGroups(rank_groups(Sizes(dp=WORLD, **dict.fromkeys(ROLES.values(), WORLD)), "vllm"))
        in_turn(SCENARIOS, rank, groups)
        groups.destroy()


@pytest.mark.ranks
def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
