"""A process of vLLM: loads models one after the other (under torchrun one only), generates, and writes what they said.

``generate.py JOB.json``, alone or under torchrun. The job: ``engines`` (name → arguments of ``LLM``), ``arrivals``
(a prompt and the number of engine steps after which it arrives), ``new_tokens``, and ``out``: rank r writes ``out.r``.
With ``plain_router`` vLLM compiles no router; with ``plain`` it answers again with vLLM's own forward; with ``die`` it
answers again, and rank 1 kills itself at a step; with ``pieces`` vLLM compiles piece by piece on this platform too, and
with ``chunks`` it prefills in chunks and takes prefixes from its cache; with ``shares`` data-parallel replica r gets
the arrivals numbered in ``shares[r]``. What an engine said comes with the steps of its scheduler (``watch.py``).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import chunks_on_cpu
import dense_indexer
import pieces_on_cpu
import replicas_on_cpu
import watch
from processes import ENGINE

DIE_AT = 5  # steps


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("plain_router"):
        route_op_by_op()
    dense_indexer.install()
    if "RANK" in os.environ:
        watch.keep_apart()
    if job.get("pieces"):
        pieces_on_cpu.install()
    if job.get("chunks"):
        chunks_on_cpu.install()
    if job.get("shares"):
        replicas_on_cpu.install()
    told: dict[str, Any] = {}
    for name, arguments in job["engines"].items():
        _engine(name, arguments, job, told)


def route_op_by_op() -> None:
    """Run the router as it is, which vLLM compiles apart from the model: a C++ compiler takes it half a minute."""
    from vllm.platforms import current_platform

    type(current_platform).simple_compile_backend = "eager"


def _engine(name: str, arguments: dict[str, Any], job: dict[str, Any], told: dict[str, Any]) -> None:
    """What the engine called ``name`` said joins ``told``, which is written."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    print(f"engine {arguments}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        arguments = {**arguments, "distributed_executor_backend": "external_launcher"}
    backend, runs = watch.time_backend(), watch.compiled_runs()
    began, busy = time.perf_counter(), sum(os.times()[:4])
    llm = LLM(**{**ENGINE, **arguments})
    ready, busy = time.perf_counter(), sum(os.times()[:4]) - busy
    steps = watch.listen(llm.llm_engine.engine_core.engine_core)
    answers = _generate(llm.llm_engine, job)
    # Processor time, children's included, says more than the clock on a machine that others use too.
    spent = {"start_up_s": ready - began, "start_up_cpu_s": busy, "backend_cpu_s": sum(backend)}
    spent["generate_s"] = time.perf_counter() - ready
    told[name] = {"answers": answers, "steps": list(steps), "idle": steps.count({}), **spent}
    if job.get("plain"):
        told[name]["runs"] = [len(runs)]
        llm.apply_model(_run_uncompiled)
        told[name]["plain"] = _generate(llm.llm_engine, job)
        told[name]["runs"].append(len(runs))
    Path(f"{job['out']}.{os.environ.get('RANK', '0')}").write_text(json.dumps(told))
    if job.get("die"):
        _generate(llm.llm_engine, {**job, "die_at": DIE_AT})
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def _run_uncompiled(model: Any) -> None:
    """Have every part of ``model`` that vLLM compiles run as vLLM wrote it, from now on."""
    for module in model.modules():
        if hasattr(module, "do_not_compile"):
            module.do_not_compile = True


def _generate(engine: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and their log-probabilities, in the order of the arrivals."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], logprobs=1, ignore_eos=True)
    found: dict[str, Any] = {}
    step = 0
    waiting = dict(enumerate(job["arrivals"]))
    if "shares" in job:
        mine = job["shares"][engine.vllm_config.parallel_config.data_parallel_rank]
        waiting = {number: waiting[number] for number in mine}
    while True:
        if step == job.get("die_at") and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        for number in [n for n, (_, when) in waiting.items() if when <= step]:
            engine.add_request(str(number), {"prompt_token_ids": waiting.pop(number)[0]}, params)
        if not engine.has_unfinished_requests() and not waiting:  # every replica asks, before every step
            return [_answer(found[number]) for number in sorted(found)]
        found.update({o.request_id: o for o in engine.step() if o.finished})
        step += 1


def _answer(output: Any) -> dict[str, list[Any]]:
    said = output.outputs[0]
    chosen = [step[token].logprob for token, step in zip(said.token_ids, said.logprobs, strict=True)]
    return {"tokens": list(said.token_ids), "logprobs": chosen, "cached": output.num_cached_tokens}


if __name__ == "__main__":
    main()
