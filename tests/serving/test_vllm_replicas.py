"""V3 on two data-parallel replicas of two ranks each, with no option: a replica without requests runs empty steps."""

from __future__ import annotations

from pathlib import Path

from expected import ARRIVALS, STEPS, checked, job, rewritten, right, same
from model_folder import make_folder
from processes import COMPILED, run

# The second gets one prompt, while the first decodes, and is done before it.
SHARES = ([0, 1, 2, 4, 5, 6, 7], [3])


def test_tokens_are_those_of_transformers_and_nothing_hangs(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "v3", hidden_size=1024)
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    engine = {"model": str(folder), **sizes, "compilation_config": COMPILED}
    work = {**job({"v3": engine}), "shares": SHARES}
    done = checked(run(tmp_path, work, ranks=4, VLLM_CPU_OMP_THREADS_BIND="nobind"))
    for rank, told in enumerate(done.told):
        same(told["v3"]["answers"], done.told[rank // 2 * 2]["v3"]["answers"])
    for rank, numbers in zip((0, 2), SHARES, strict=True):
        right(folder, [ARRIVALS[number][0] for number in numbers], done.told[rank]["v3"]["answers"])
    for rank in range(2):
        found = rewritten(done.log, rank)  # of both replicas, whose lines are mixed
        least = max(first for first, *_ in found)
        assert sorted(found) == [(0, 0, 7)] * 2 + [(least, 7, 7)] * 2
        # While one replica runs the graph of large steps, the other runs that of small ones.
        steps = [told["v3"]["steps"] for told in done.told[::2]]
        tokens = [[sum(count for _, count in step.values()) for step in each] for each in steps]
        assert any(min(pair) < least <= max(pair) for pair in zip(*tokens, strict=True))
    busy, _, idle, other = (told["v3"]["steps"] for told in done.told)
    assert idle[: STEPS[3] + 1] == [{}] * STEPS[3] + [{"3": [0, 31]}] and idle[-1] == {}
    assert idle == other and len(idle) == len(busy) and all(busy)
