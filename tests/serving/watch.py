"""Looking at a running vLLM: what its scheduler does, how long this project's backend takes; and apart from others."""

from __future__ import annotations

import os
import time
from typing import Any


def time_backend() -> list[float]:
    """Processor time, s, of each call of this project's backend from now on."""
    from cpcompile.serving.vllm_entry import Entry

    spent: list[float] = []
    original = Entry.__call__

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(time.process_time() - began)

    Entry.__call__ = timed  # type: ignore[method-assign]
    return spent


def compiled_runs() -> list[int]:
    """Grows with each run of a graph that this project compiled, from now on: the run's number of inputs."""
    from cpcompile.run_code import RunCode

    runs: list[int] = []
    original = RunCode.__call__

    def counted(self: Any, args: Any) -> Any:
        runs.append(len(args))
        return original(self, args)

    RunCode.__call__ = counted  # type: ignore[method-assign]
    return runs


def listen(core: Any) -> list[dict[str, tuple[int, int]]]:
    """What the engine core will do, step by step: request → (tokens computed before, tokens of this step).

    A step that a data-parallel replica without requests runs for the sake of the others is empty.
    """
    steps: list[dict[str, tuple[int, int]]] = []
    schedule, idle = core.scheduler.schedule, core.execute_dummy_batch

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        running = step.scheduled_cached_reqs
        before = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        before.update(zip(running.req_ids, running.num_computed_tokens, strict=True))
        # vLLM adds a random end to the names that requests were given.
        steps.append({k.split("-")[0]: (before[k], count) for k, count in step.num_scheduled_tokens.items()})
        return step

    def idled() -> None:
        steps.append({})
        idle()

    core.scheduler.schedule, core.execute_dummy_batch = scheduled, idled
    return steps


def keep_apart() -> None:
    """Name shared memory by this job's port: under torchrun vLLM gives all jobs of a host the same names."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original = _CPUSHMDistributed.make_group_name
    port = os.environ["MASTER_PORT"]
    _CPUSHMDistributed.make_group_name = staticmethod(lambda group: f"{port}-{original(group).lstrip('/')}")
