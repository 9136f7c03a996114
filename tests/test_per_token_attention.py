"""npu attention over requests becomes the same over rows, exactly, or keeps its form with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
import torch.fx as fx
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.capture import capture
from cpcompile.passes.npu_attention import NpuAttention
from cpcompile.passes.per_token_attention import PerTokenAttention

npu, air = torch.ops.npu, torch.ops.air
TOKENS, HEADS, LATENT, ROPE, SIZE, BLOCKS, COUNT = 11, 2, 8, 4, 4, 13, 5
TND = {"layout_query": "TND", "sparse_mode": 3}


def index(
    query: Tensor, keys: Tensor, weights: Tensor, ends: Tensor, lengths: Tensor, table: Tensor, **other: Any
) -> Any:
    given = {
        **TND, "layout_key": "PA_BSND", "sparse_count": COUNT, "actual_seq_lengths_query": ends,
        "actual_seq_lengths_key": lengths, "block_table": table, **other,
    }  # fmt: skip
    return npu.npu_lightning_indexer(query, keys, weights, **given)


def attend(
    query: Tensor, keys: Tensor, chosen: Tensor, query_rope: Tensor, ropes: Tensor, ends: Tensor, lengths: Tensor,
    table: Tensor, value: str = "keys", **other: Any,
) -> Any:  # fmt: skip
    given = {
        **TND, "layout_kv": "PA_BSND", "attention_mode": 2, "query_rope": query_rope, "key_rope": ropes,
        "actual_seq_lengths_query": ends, "actual_seq_lengths_kv": lengths, "block_table": table, **other,
    }  # fmt: skip
    values = {"keys": keys, "none": None, "others": keys + 1}[value]
    return npu.npu_sparse_flash_attention(query, keys, values, chosen, 0.3, **given)


def dense(
    query: Tensor, keys: Tensor, query_rope: Tensor, ropes: Tensor, mask: Tensor, ends: Tensor, lengths: Tensor,
    table: Tensor, **other: Any,
) -> Any:  # fmt: skip
    given = {
        "input_layout": "TND", "sparse_mode": 3, "num_heads": HEADS, "num_key_value_heads": 1, "block_size": SIZE,
        "query_rope": query_rope, "key_rope": ropes, "atten_mask": mask, "actual_seq_lengths": ends,
        "actual_seq_lengths_kv": lengths, "block_table": table, "scale": 0.3, **other,
    }  # fmt: skip
    return air.npu_fused_infer_attention_score(query, keys, keys, **given)


def batch_of(ends: list[int], lengths: list[int]) -> list[Tensor]:
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0))[: BLOCKS // 3 * 3].view(3, -1)
    return [torch.tensor(ends, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), table.int()[: len(ends)]]


def operands(kind: str, tokens: int = TOKENS) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    query, keys = randn(tokens, HEADS, LATENT), randn(BLOCKS, SIZE, 1, LATENT)
    query_rope, ropes = randn(tokens, HEADS, ROPE), randn(BLOCKS, SIZE, 1, ROPE)
    if kind == "index":
        return [query, keys, randn(tokens, HEADS)]
    if kind == "attend":
        chosen = torch.rand(tokens, 1, 4 * SIZE, generator=g).argsort(-1)[..., :COUNT].int()
        return [query, keys, chosen, query_rope, ropes]
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    return [query, keys.transpose(1, 2), query_rope, ropes.transpose(1, 2), mask]


FUNCTIONS: dict[str, Callable[..., Any]] = {"index": index, "attend": attend, "dense": dense}


def graph(kind: str, given: list[Tensor], **other: Any) -> fx.GraphModule:
    """Static sizes, to be quick."""
    gm = make_fx(lambda *args: FUNCTIONS[kind](*args, **other)[0], tracing_mode="fake")(*given)
    gm.graph.eliminate_dead_code()
    return gm


def names(gm: fx.GraphModule) -> list[str]:
    return [str(n.target).removesuffix(".default") for n in gm.graph.nodes if "npu" in str(n.target)] + [
        str(n.target).removesuffix(".default") for n in gm.graph.nodes if "paged" in str(n.target)
    ]


BATCHES = [
    ([3, 4, 11], [3, 9, 7]),  # prefixes of 0 and 8
    ([11], [16]),
    ([0, 11, 11], [5, 12, 3]),  # requests without queries
    ([2, 6], [6, 4]),  # rows behind the last request, as graphs of fixed sizes have them
    ([5, 11], [3, 6]),  # fewer keys than queries: the first rows see none
]


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("ends", "lengths"), BATCHES)
def test_the_rows_see_what_the_requests_rows_saw(kind: str, ends: list[int], lengths: list[int]) -> None:
    batch = batch_of(ends, lengths)
    batch = batch if kind != "dense" else [batch[0].long(), batch[1].long(), batch[2]]
    given = [*operands(kind), *batch]
    gm = graph(kind, given)
    expected = gm(*given)
    assert PerTokenAttention()(gm).rewrites == 1
    used = ends[-1]
    torch.testing.assert_close(gm(*given)[:used], expected[:used], rtol=1e-12, atol=1e-12)
    behind = gm(*given)[used:]
    assert (behind == (-1 if kind == "index" else 0)).all()


def test_the_text() -> None:
    given = [*operands("index"), *batch_of([3, 4, 11], [3, 9, 7])]
    gm = capture(lambda *args: index(*args)[0], *given).gm
    assert PerTokenAttention()(gm).rewrites == 1
    shown = [n for n in gm.graph.nodes if n.op != "placeholder" and n.op != "output"]
    lines = [f"{n} = {str(n.target).removesuffix('.default')}{n.args}".replace("_default", "") for n in shown]
    assert_expected_inline(
        "\n".join(lines),
        """\
arange = aten.arange(11,)
unsqueeze = aten.unsqueeze(arange, 1)
unsqueeze_1 = aten.unsqueeze(arg4_1, 0)
ge_tensor = aten.ge.Tensor(unsqueeze, unsqueeze_1)
sum_dim_int_list = aten.sum.dim_IntList(ge_tensor, [1])
select_int = aten.select.int(arg4_1, 0, -1)
ge_tensor_1 = aten.ge.Tensor(arange, select_int)
_to_copy = aten._to_copy(ge_tensor_1,)
sub_tensor = aten.sub.Tensor(sum_dim_int_list, _to_copy)
index_select = aten.index_select(arg4_1, 0, sub_tensor)
index_select_1 = aten.index_select(arg6_1, 0, sub_tensor)
sub_tensor_1 = aten.sub.Tensor(index_select_1, index_select)
add_tensor = aten.add.Tensor(sub_tensor_1, arange)
add_tensor_1 = aten.add.Tensor(add_tensor, 1)
clamp_min = aten.clamp_min(add_tensor_1, 0)
lt_tensor = aten.lt.Tensor(arange, index_select)
mul_tensor = aten.mul.Tensor(clamp_min, lt_tensor)
index_select_2 = aten.index_select(arg9_1, 0, sub_tensor)
paged_lightning_indexer = cpcompile.paged_lightning_indexer(arg0_1, arg1_1, arg2_1, mul_tensor, index_select_2, 5)""",
    )
    assert PerTokenAttention()(gm).rewrites == 0


REFUSED = [
    ("index", {"sparse_mode": 0}, "expected sparse_mode=3, found 0"),
    ("index", {"layout_key": "TND"}, "expected layout_key='PA_BSND', found 'TND'"),
    ("index", {"pre_tokens": 4}, "expected pre_tokens=9223372036854775807, found 4"),
    ("index", {"return_value": True}, "expected return_value=False, found True"),
    ("index", {"block_table": None}, "expected a tensor block_table, found None"),
    ("index", {"actual_seq_lengths_query": None}, "expected a tensor actual_seq_lengths_query, found None"),
    ("attend", {"attention_mode": 0}, "expected attention_mode=2, found 0"),
    ("attend", {"sparse_block_size": 2}, "expected sparse_block_size=1, found 2"),
    ("attend", {"return_softmax_lse": True}, "expected return_softmax_lse=False, found True"),
    ("attend", {"value": "others"}, "expected the keys' latents as values, found add"),
    ("attend", {"actual_seq_lengths_kv": None}, "expected a tensor actual_seq_lengths_kv, found None"),
    ("dense", {"sparse_mode": 0}, "expected sparse_mode=3, found 0"),
    ("dense", {"input_layout": "BSND"}, "expected input_layout='TND', found 'BSND'"),
    ("dense", {"num_key_value_heads": 2}, "expected num_key_value_heads=1, found 2"),
    ("dense", {"atten_mask": None}, "expected the atten_mask [2048, 2048] that sparse_mode 3 takes"),
]


@pytest.mark.parametrize(("kind", "other", "reason"), REFUSED)
def test_what_is_not_exactly_this_keeps_its_form(kind: str, other: dict[str, Any], reason: str) -> None:
    gm = graph(kind, [*operands(kind), *batch_of([3, 4, 11], [3, 9, 7])], **other)
    before = str(gm.graph)
    result = PerTokenAttention()(gm)
    assert result.rewrites == 0 and reason in result.refusals[0].reason
    assert str(gm.graph) == before


def test_other_tensors_shapes_and_dtypes_are_refused() -> None:
    batch = batch_of([3, 4, 11], [3, 9, 7])
    sinks = make_fx(lambda *args: attend(*args, sinks=args[0][0, :, 0])[0], tracing_mode="fake")(
        *operands("attend"), *batch
    )
    sinks.graph.eliminate_dead_code()
    heads = operands("index")
    heads[1] = heads[1].repeat(1, 1, 2, 1)
    two = graph("index", [*heads, *batch])
    floats = graph("index", [*operands("index"), batch[0], batch[1].float(), batch[2]])
    fewer = graph("index", [*operands("index"), batch[0], batch[1][:2], batch[2]])
    for gm, reason in (
        (sinks, "expected no sinks, found"),
        (two, "expected one head of key, found 2"),
        (floats, "expected actual_seq_lengths_key in int32, found torch.float32"),
        (fewer, "differ in the number of requests"),
    ):
        assert reason in PerTokenAttention()(gm).refusals[0].reason


def test_other_results_that_are_read_are_refused() -> None:
    given = [*operands("attend"), *batch_of([3, 4, 11], [3, 9, 7])]
    gm = make_fx(lambda *args: attend(*args)[:2], tracing_mode="fake")(*given)
    (refusal,) = PerTokenAttention()(gm).refusals
    assert "more than its first result is read" in refusal.reason


# ---- and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_round_trip(kind: str) -> None:
    """One npu call with one row for each token computes what the call over requests computes."""
    given = [*operands(kind), *batch_of([3, 4, 11], [3, 9, 7])]
    gm = graph(kind, given)
    expected, before = gm(*given), names(gm)
    PerTokenAttention()(gm)
    assert names(gm) != before
    result = NpuAttention()(gm)
    assert result.rewrites == 1 and not result.refusals and names(gm) == before
    torch.testing.assert_close(gm(*given), expected, rtol=1e-12, atol=1e-12)
    assert NpuAttention()(gm).rewrites == 0
