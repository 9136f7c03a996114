"""One rank of SGLang: its scheduler, its model runner and its process groups, driven step by step.

``serve.py JOB.json RANK``. The job: ``flags`` and ``switches`` of the server, ``ranks``, ``port``, ``arrivals`` (a
prompt and the step at which it arrives), ``new_tokens``, and ``out``: rank r writes ``out.r``. On request

- ``compare``: every step also runs SGLang's own forward, ahead of the compiled one; what is written has how far the
  hidden states are apart;
- ``mix``: it answers again, from an empty cache, without log-probabilities, which keep SGLang from mixing prefill and
  decode in a step;
- ``plain``: it answers again with SGLang's own forward;
- ``drop``: it answers again, with all-reduces that do nothing;
- ``die``: it answers again, and rank 1 kills itself at the end of a step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from array import array
from pathlib import Path
from typing import Any

import native_cpu  # noqa: F401  before SGLang
import sparse_native
import torch
import watch

COMMON = {
    "--device": "cpu",
    "--dtype": "float32",
    "--context-length": "256",
    "--max-total-tokens": "2048",
    "--max-running-requests": "8",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--random-seed": "0",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
}
SWITCHES = ("--skip-tokenizer-init", "--disable-overlap-schedule", "--skip-server-warmup")


def main() -> None:
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    code = 0
    try:
        serve(job, rank)
    except Exception:  # SGLang's own process says it and ends, too
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the scheduler's threads wait for a server


def serve(job: dict[str, Any], rank: int) -> None:
    runs, scheduler = watch.compiled_runs(), start(job, rank)
    runner, told = scheduler.tp_worker.model_runner, {"steps": []}
    if job.get("compare"):
        compare(runner.model.model, told["steps"])
    told["answers"] = generate(scheduler, job)
    if job.get("mix"):
        assert scheduler.flush_cache()
        told["mixed"] = generate(scheduler, job, logprobs=False)
    if job.get("plain"):
        assert scheduler.flush_cache()
        told["runs"] = [len(runs)]
        del runner.model.model.forward  # the compiled one, in the place of its class's
        with torch.compiler.set_stance("force_eager"):
            told["plain"] = generate(scheduler, job)
        told["runs"].append(len(runs))
    if job.get("drop"):
        from sglang.srt.distributed.parallel_state import GroupCoordinator

        GroupCoordinator.all_reduce = lambda self, x: x
        told["dropped"] = generate(scheduler, job)
    told["modes"] = sorted(job["modes"])
    Path(f"{job['out']}.{rank}").write_text(json.dumps(told))
    if job.get("die"):
        if rank == 1:
            scheduler.process_batch_result = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        generate(scheduler, job)


def start(job: dict[str, Any], rank: int) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    sparse_native.install()
    from sglang.srt.managers import scheduler
    from sglang.srt.server_args import PortArgs, prepare_server_args

    given = {**COMMON, "--tp-size": str(job["ranks"]), "--nccl-port": str(job["port"]), **job["flags"]}
    words = [*SWITCHES, *job["switches"], *(word for pair in given.items() for word in pair)]
    args = prepare_server_args(words)
    args.resolve_once()
    world_rank = scheduler.spawn_world_rank(args, tp_rank=rank, pp_rank=0)
    where = scheduler.SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=rank)
    scheduler.publish(args, role="scheduler", ranks=where)
    return scheduler.Scheduler(args, PortArgs.init_new(args))


def compare(body: torch.nn.Module, steps: list[tuple[int, float]]) -> None:
    """Have ``body`` note of each step its tokens and the largest difference from SGLang's own forward."""
    compiled, plain = body.forward, type(body).forward

    def both(input_ids: torch.Tensor, positions: Any, batch: Any, *rest: Any, **more: Any) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):  # its router is compiled by inductor, which takes half a minute
            expected = plain(body, input_ids, positions, batch, *rest, **more)
        found: torch.Tensor = compiled(input_ids, positions, batch, *rest, **more)
        error = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
        steps.append((len(input_ids), error))
        return found

    body.forward = both


@torch.no_grad()
def generate(scheduler: Any, job: dict[str, Any], logprobs: bool = True) -> list[dict[str, Any]]:
    """Tokens, their log-probabilities, and tokens found in the cache, in the order of the arrivals."""
    waiting, requests, step, batch = dict(enumerate(job["arrivals"])), {}, 0, None
    while waiting or batch or any(not request.finished() for request in requests.values()):
        for number in [n for n, (_, when) in waiting.items() if when <= step]:
            requests[number] = arrive(scheduler, str(number), waiting.pop(number)[0], job["new_tokens"], logprobs)
        # The body of Scheduler.event_loop_normal.
        plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            job.setdefault("modes", set()).add(batch.forward_mode.name)
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        scheduler.last_batch = batch
        step += 1
    return [
        {
            "tokens": list(r.output_ids),
            "logprobs": list(r.logprob.output_token_logprobs_val) if logprobs else [],
            "cached": r.cached_tokens,
        }
        for _, r in sorted(requests.items())
    ]


def arrive(scheduler: Any, name: str, prompt: list[int], new_tokens: int, logprobs: bool) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
    params.normalize(None)
    request = TokenizedGenerateReqInput(
        rid=name,
        input_text=None,
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=logprobs,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
    scheduler.process_input_requests([request])
    (found,) = [r for r in scheduler.waiting_queue if r.rid == name]
    return found


if __name__ == "__main__":
    main()
