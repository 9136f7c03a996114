"""Targets of the command line: a function that makes a model, a directory with a configuration, or a saved trace."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.errors import AxisError, OptionError, TraceError, nearest
from cpcompile.lowering.ascend.installation import keep_transformers_off
from cpcompile.model_shapes import read_json
from cpcompile.trace_file import SUFFIX, blaming, load_trace

EXAMPLE_TOKENS = 16  # the trace is symbolic in it
REPLICA = "replica"  # the mesh dim of whole copies of a model

# Attention that the library's own plan for V3 leaves whole, and the embedding, by the end of the module's name.
_PLAN_ADDITIONS = {
    "self_attn.q_proj": "colwise",
    "self_attn.q_b_proj": "colwise",
    "self_attn.kv_b_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
_REQUIRED = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass
class Target:
    """A model as the command line names it, traced.

    Args:
        trace: the graph of one rank.
        axes: its mesh axes.
        replicated: what is known of inputs that carry no placement of their own.
        alive: whether the axes' process groups exist, while the block of ``trace_target`` lasts.
    """

    trace: Trace
    axes: list[Axis]
    replicated: tuple[str, ...] = ()
    alive: bool = True


@dataclass
class _Spec:
    model: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    replicated: tuple[str, ...] = ()


def parse_axes(texts: Sequence[str], rank: int = 0, replicas: int = 1) -> dict[str, int]:
    """``["tp=16"]`` as ``{"tp": 16}``, and a check that ``rank`` is one of these ranks, of which there are replicas.

    Raises:
        OptionError: a text is not ``name=size``, a size is no integer of at least 2, a name comes twice.
        AxisError: there is no such rank.
    """
    axes: dict[str, int] = {}
    for text in texts:
        name, equals, size = text.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"--axis {text!r}: expected name=size, such as tp=16")
        if not size.isdecimal() or int(size) < 2:
            raise OptionError(f"--axis {text!r}: expected an integer of at least 2 ranks, found {size!r}")
        if name in axes:
            raise OptionError(f"--axis {text!r}: axis {name!r} is given twice")
        axes[name] = int(size)
    world = replicas * math.prod(axes.values())
    if not 0 <= rank < world:
        mesh = ", ".join(f"{name}={size}" for name, size in axes.items()) or "of one rank, for no --axis is given"
        mesh = f"{mesh}; {replicas} of it" if replicas > 1 else mesh
        raise AxisError(f"--rank {rank} is out of range: the mesh ({mesh}) has ranks 0 to {world - 1}")
    return axes


@contextmanager
def trace_target(target: str, axes: Mapping[str, int], rank: int = 0, replicas: int = 1) -> Iterator[Target]:
    """Trace what ``target`` names as rank ``rank`` of the mesh ``axes``; needs no other process and no accelerator.

    The fake process group lives as long as the block: facts of DTensors are read off their meshes.

    Args:
        target: ``file.py:function``, ``package.module:function``, a directory with ``config.json``, or a trace file.
        axes: mesh axis name → number of ranks.
        rank: this rank's number in the mesh, row-major; among all ranks, where there are replicas of it.
        replicas: how many such meshes there are, one after another.

    Raises:
        TraceError: the target cannot be found, built, sharded or traced.
        AxisError: the target has no use for an axis.
        OptionError: axes are given for a trace, which has its own.
    """
    path = Path(target)
    if path.suffix == SUFFIX or (path.is_file() and path.suffix != ".py"):
        if axes or rank:
            raise OptionError(
                f"{target} is a saved trace, which has its own axes and rank: leave out --axis and --rank"
            )
        saved = load_trace(path)
        with blaming(path):
            yield Target(saved.trace, saved.axes, saved.replicated, alive=False)
        return
    with fake_mesh(axes, rank, replicas) as mesh:
        spec = _from_directory(path, mesh) if path.is_dir() else _from_function(target, mesh)
        trace = capture(spec.model, *spec.args, **spec.kwargs)
        yield Target(trace, [axis_of(name, mesh[name]) for name in axes] if mesh else [], spec.replicated)


@contextmanager
def fake_mesh(axes: Mapping[str, int], rank: int, replicas: int = 1) -> Iterator[DeviceMesh | None]:
    """This process as one rank of a mesh whose other ranks do not exist; collectives do nothing. None without axes.

    Of ``replicas`` such meshes, it is the one that ``rank``, counted through all of them, is in.
    """
    world = replicas * math.prod(axes.values())
    if world == 1:
        yield None
        return
    if dist.is_initialized():
        raise TraceError("a process group is initialised already: trace in a process of its own")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        if not axes:
            yield None
        elif replicas == 1:
            yield init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        else:
            names = (REPLICA, *axes)
            yield init_device_mesh("cpu", (replicas, *axes.values()), mesh_dim_names=names)[tuple(axes)]
    finally:
        dist.destroy_process_group()


# ---- a function ----------------------------------------------------------------------------------------------------


def _forget_meshes() -> None:
    """Clear what DTensor keeps by mesh: it takes parts of one mesh, of other ranks and other groups, for equal."""
    from torch.distributed.tensor import debug

    for name in ("_clear_sharding_prop_cache", "_clear_python_sharding_prop_cache"):
        getattr(debug, name, lambda: None)()  # releases have the one or the other, and the first has all


def _from_function(target: str, mesh: DeviceMesh | None) -> _Spec:
    where, colon, name = target.rpartition(":")
    if not colon:
        raise TraceError(f"{target!r} is no directory, trace, file.py:function or package.module:function")
    function = _find(_module(where), where, name)
    given: dict[str, Any] = {}
    if "mesh" in inspect.signature(function).parameters:
        if mesh is None and inspect.signature(function).parameters["mesh"].default is inspect.Parameter.empty:
            raise OptionError(f"{target} takes a mesh: name its axes, such as --axis tp=16")
        given = {"mesh": mesh} if mesh is not None else {}
    try:
        result = function(**given)
    except Exception as error:
        raise TraceError(f"{target} raised {type(error).__name__}: {_first_line(error)}") from error
    return _checked(target, result)


def _module(where: str) -> Any:
    path = Path(where)
    try:
        if path.suffix != ".py":
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(where)
        if not path.is_file():
            raise TraceError(f"there is no file {where}")
        sys.path.insert(0, str(path.parent.resolve()))
        name = f"cpcompile_target_{path.stem}"  # never the name of a module that is loaded already
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"cannot import {where}: {type(error).__name__}: {_first_line(error)}") from error


def _find(module: Any, where: str, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise TraceError(f"{where} has no function {name!r}{nearest(name, functions)}")
    return found  # type: ignore[no-any-return]


def _checked(target: str, result: object) -> _Spec:
    if isinstance(result, tuple) and len(result) in (2, 3) and callable(result[0]):
        model, args, *rest = result
        kwargs = rest[0] if rest else {}
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            return _Spec(model, args, kwargs)
    kinds = f"({', '.join(type(r).__name__ for r in result)})" if isinstance(result, tuple) else type(result).__name__
    raise TraceError(f"{target}: expected (model, args) or (model, args, kwargs), found {kinds}")


# ---- a configuration -----------------------------------------------------------------------------------------------


def _from_directory(directory: Path, mesh: DeviceMesh | None) -> _Spec:
    """A model of the transformers library from its ``config.json``, on the meta device.

    It is tensor-parallel over ``tp``, and whole on the ranks of ``cp``.
    """
    keep_transformers_off()
    config = _read_config(directory)
    names = (mesh.mesh_dim_names if mesh is not None else None) or ()
    for name in names:
        if name not in ("tp", "cp"):
            raise AxisError(
                "a model from a configuration is sharded over the axis 'tp' only, and whole on the ranks of 'cp'; "
                f"found {name!r}: use --axis tp=N or --axis cp=N"
            )
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            dtype = getattr(config, "dtype", None) or torch.bfloat16
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            ids = torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64)
        replicated = ("*", *_shard(model, mesh["tp"])) if mesh is not None and "tp" in names else ("*",)
    except Exception as error:
        raise TraceError(
            f"{directory}: cannot build the model: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return _Spec(model, (), {"input_ids": ids, "use_cache": False}, replicated)


def _read_config(directory: Path) -> Any:
    path = directory / "config.json"
    data = read_json(path)
    missing = [key for key in _REQUIRED if not isinstance(data, dict) or key not in data]
    if missing:  # the library would fill in the full model's size
        raise TraceError(f"{path} has no {missing[0]!r}: give the model's own configuration")
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise TraceError(
            "a configuration needs the transformers library: pip install cpcompile[transformers]"
        ) from error
    if data["model_type"] not in CONFIG_MAPPING:
        known = nearest(data["model_type"], CONFIG_MAPPING)
        raise TraceError(f"{path}: unknown model_type {data['model_type']!r}{known if 'mean' in known else ''}")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise TraceError(f"{path} is not valid: {type(error).__name__}: {_first_line(error)}") from error


def _shard(model: Any, mesh: DeviceMesh) -> list[str]:
    """Shard ``model`` over ``mesh``; return ``!`` patterns of what was cut without becoming a DTensor."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = dict(model.tp_plan or {})
    names = [name for name, _ in model.named_modules()]
    for end, style in _PLAN_ADDITIONS.items():
        if any(name.endswith(f".{end}") for name in names):
            plan[f"model.layers.*.{end}"] = style
    if "model.embed_tokens" in names:
        plan["model.embed_tokens"] = "embedding_rowwise"
    whole = {name: value.shape for name, value in _tensors(model)}
    model._tp_plan = plan  # an argument of apply_tensor_parallelism only since transformers 5.19
    apply_tensor_parallelism(model, mesh)
    return [f"!{n}" for n, v in _tensors(model) if not isinstance(v, DTensor) and whole.get(n) != v.shape]


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
