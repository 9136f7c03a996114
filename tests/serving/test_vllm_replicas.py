"""V3 on two data-parallel replicas of two ranks each: a replica without requests runs steps that are empty."""

from __future__ import annotations

from pathlib import Path

from expected import ARRIVALS, NEW_TOKENS, STEPS, checked, job, same, transformers_says
from model_folder import make_folder
from processes import COMPILED, run

# The second gets one prompt, while the first decodes, and is done before it.
SHARES = ([0, 1, 2, 4, 5, 6, 7], [3])


def test_tokens_are_those_of_transformers_and_nothing_hangs(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "v3")
    options = {"cpcompile": {"strategy": "tp", "require": ["*"]}}
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    engine = {"model": str(folder), **sizes, "compilation_config": COMPILED, "additional_config": options}
    work = {**job({"v3": engine}), "shares": SHARES}
    done = checked(run(tmp_path, work, ranks=4, VLLM_CPU_OMP_THREADS_BIND="nobind"))
    wanted = transformers_says(folder, [ids for ids, _ in ARRIVALS], NEW_TOKENS)
    for rank, told in enumerate(done.told):
        same(told["v3"]["answers"], [wanted[number] for number in SHARES[rank // 2]])
    for rank in range(2):
        assert done.log.count(f"rank {rank} of 2 of axis tp: 7 of 7 all-reduces rewritten") == 2
    busy, _, idle, other = (told["v3"]["steps"] for told in done.told)
    assert idle[: STEPS[3] + 1] == [{}] * STEPS[3] + [{"3": [0, 31]}] and idle[-1] == {}
    assert idle == other and len(idle) == len(busy) and all(busy)
