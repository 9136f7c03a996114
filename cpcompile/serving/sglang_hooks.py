"""What keeps dynamo from reading SGLang's DeepSeek as one graph, taken away by hooks where the user asks for us.

Three calls become opaque ops, which the graph runs as SGLang would and which need every row:

- ``RadixAttention.forward``: it writes and reads the cache by the whole batch's lengths, which the batch holds;
- ``Indexer.forward`` (DeepSeek-V3.2): so does it, with keys of its own;
- ``FusedMoE.forward``: its experts are this rank's part, and its loop over them is the data's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar

import torch
from torch import Tensor

NAMESPACE = "cpcompile_sglang"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor? k, Tensor? v, Tensor[] more, str[] names, str module, SymInt width, bool save)"
    " -> Tensor"
)
_LIBRARY.define("indexer(Tensor x, Tensor q_lora, Tensor positions, str module) -> Tensor")
_LIBRARY.define("experts(Tensor x, Tensor weights, Tensor ids, Tensor logits, str module) -> Tensor")
#: Modules that the opaque ops call, by their name in the model, with their own forward.
_MODULES: dict[str, tuple[Any, Callable[..., Any]]] = {}
_NAME = "_cpcompile_name"


class Batch:
    """The batch that this process runs: attention reads from it what is no argument of the graph."""

    current: ClassVar[Any] = None


def _attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, more: Sequence[Tensor], names: Sequence[str], *rest: Any
) -> Tensor:
    module, width, save = rest
    layer, forward = _MODULES[module]
    out: Tensor = forward(layer, q, k, v, Batch.current, save, **dict(zip(names, more, strict=True)))
    return out.reshape(q.shape[0], width)


def _indexer(x: Tensor, q_lora: Tensor, positions: Tensor, module: str) -> Tensor:
    layer, forward = _MODULES[module]
    picked: Tensor | None = forward(layer, x, q_lora, positions, Batch.current, layer.layer_id)
    if picked is None:
        raise NotImplementedError(f"{module}: SGLang's indexer picked no keys, which cpcompile does not know")
    return picked


def _experts(x: Tensor, weights: Tensor, ids: Tensor, logits: Tensor, module: str) -> Tensor:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    layer, forward = _MODULES[module]
    out: Tensor = forward(layer, x, StandardTopKOutput(weights, ids, logits))
    return out.clone() if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else out


def _indexer_shape(x: Tensor, q_lora: Tensor, positions: Tensor, module: str) -> Tensor:
    return x.new_empty(x.shape[0], _MODULES[module][0].topk_output_width, dtype=torch.int32)


def _attention_shape(q: Tensor, k: Any, v: Any, more: Any, names: Any, module: str, width: Any, save: bool) -> Tensor:
    return q.new_empty(q.shape[0], width)


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("indexer", _indexer, "CompositeExplicitAutograd")
_LIBRARY.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::attention", _attention_shape, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::indexer", _indexer_shape, lib=_LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::experts", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)


def install() -> None:
    """Register and apply the hooks of a process that compiles with this backend. May be called again."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if AROUND.keys() <= HookRegistry._hooks.keys():
        return
    # Dynamo's table of torch's functions, once and before one of them is another: an import of torch_npu empties it.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    for target, around in AROUND.items():
        HookRegistry.register(target, around, HookType.AROUND)
    for target in STRUCTS:
        HookRegistry.register(target, _plain_class(resolve_name(target)), HookType.REPLACE)
    for name in parallel_state._CONTEXT_NAME_OF:
        getter = getattr(parallel_state, name, None)
        if getter is not None:
            HookRegistry.register(f"{parallel_state.__name__}.{name}", getter.__wrapped__, HookType.REPLACE)
    HookRegistry.apply_hooks()


def _plain_class(struct: Any) -> type:
    """A msgspec struct as a dataclass, which dynamo can make instances of."""
    names = struct.__struct_fields__
    needed = len(names) - len(struct.__struct_defaults__)
    fields: list[Any] = [(name, Any) for name in names[:needed]]
    for name, default in zip(names[needed:], struct.__struct_defaults__, strict=True):
        fields.append((name, Any, dataclasses.field(default=default)))
    own = {k: v for k, v in vars(struct).items() if callable(v) and (k == "__post_init__" or not k.startswith("__"))}
    return dataclasses.make_dataclass(struct.__name__, fields, namespace=own)


def name_modules(model: torch.nn.Module) -> None:
    """Give every module that an opaque op stands for its name in ``model``."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        if isinstance(module, (RadixAttention, Indexer, FusedMoE)):
            setattr(module, _NAME, name)
            _MODULES[name] = (module, type(module).forward)
        for boundary in (getattr(module, "attn_boundary", None), getattr(module, "ffn_boundary", None)):
            if boundary is not None:
                _ = boundary.plan.output  # a cached property: dynamo does not read the lock that it is made under


def _radix_attention(original: Callable[..., Any], layer: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> Any:
    if not torch.compiler.is_compiling():
        return original(layer, q, k, v, *rest, **more)
    save = more.pop("save_kv_cache", rest[1] if len(rest) > 1 else True)
    given = {name: value for name, value in more.items() if isinstance(value, Tensor)}
    _check_rest(layer, *rest[2:], *(value for name, value in more.items() if name not in given))
    width = layer.tp_q_head_num * layer.v_head_dim
    name = getattr(layer, _NAME)
    op = torch.ops.cpcompile_sglang.attention
    return op(q, k, v, list(given.values()), list(given), name, width, save)


def _sparse_indexer(original: Callable[..., Any], layer: Any, *args: Any, **more: Any) -> Any:
    if not torch.compiler.is_compiling():
        return original(layer, *args, **more)
    x, q_lora, positions, _, number, *rest = (*args, *(more.pop(name) for name in INDEXED[len(args) :]))
    _check_rest(layer, *rest, *more.values(), None if number == layer.layer_id else number)
    if not isinstance(x, Tensor):
        raise NotImplementedError(f"{getattr(layer, _NAME)}: quantised inputs are not known to cpcompile under SGLang")
    return torch.ops.cpcompile_sglang.indexer(x, q_lora, positions, getattr(layer, _NAME))


def _fused_moe(original: Callable[..., Any], layer: Any, hidden: Any, topk: Any, *rest: Any, **more: Any) -> Any:
    if not torch.compiler.is_compiling():
        return original(layer, hidden, topk, *rest, **more)
    _check_rest(layer, *rest, *more.values())
    op = torch.ops.cpcompile_sglang.experts
    return op(hidden, topk.topk_weights, topk.topk_ids, topk.router_logits, getattr(layer, _NAME))


def _check_rest(layer: Any, *rest: Any) -> None:
    """Refuse arguments that no opaque op carries."""
    if any(value is not None for value in rest):
        raise NotImplementedError(
            f"{getattr(layer, _NAME)}: called with arguments that cpcompile does not know under SGLang"
        )


def _bmm(original: Callable[..., Tensor], left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Into a transposed ``out``, which dynamo does not read."""
    return original(left, right) if out is None else out.copy_(original(left, right))


def _no_shared_memory(original: Callable[..., bool], *_: Any) -> bool:
    """All-reduces by the group: those in shared memory name none, and dynamo cannot import ``sgl_kernel`` to ask."""
    return False


#: Arguments of the indexer that the op carries, or finds in the batch and the layer.
INDEXED = ("x", "q_lora", "positions", "forward_batch", "layer_id")

AROUND: dict[str, Callable[..., Any]] = {
    "sglang.srt.layers.radix_attention.RadixAttention.forward": _radix_attention,
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.forward": _sparse_indexer,
    "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward": _fused_moe,
    "torch.bmm": _bmm,
    "sglang.srt.utils.common.is_shm_available": _no_shared_memory,
}

_BOUNDARY = "sglang.srt.layers.layer_boundary"
#: What layers hand to each other, made anew in every step.
STRUCTS = (
    f"{_BOUNDARY}.output.UnreducedOutput",
    f"{_BOUNDARY}.exit.ExitDecision",
    f"{_BOUNDARY}.residual.stream.DeclaredSum",
    f"{_BOUNDARY}.residual.stream.Contribution",
    f"{_BOUNDARY}.residual.stream.OwedOutput",
)
