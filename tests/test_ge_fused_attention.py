"""GE's fused attention in each layout, whole and paged, against a loop over requests, rows and heads."""

from __future__ import annotations

from typing import Any

import pytest
import test_ge_attention
import torch
from ge_build import run_op
from test_ge_attention import rand
from torch import Tensor

from cpcompile.lowering.ge import GeError

COVERED = {"FusedInferAttentionScore"}

BATCH, ROWS, KEYS, HEADS, GROUPS, WIDTH, ROPE, WIDE, SIZE = 3, 5, 9, 4, 2, 6, 2, 7, 4
SCALE = 0.3
QUERY, QUERY_ROPE = rand(BATCH, ROWS, HEADS, WIDTH), rand(BATCH, ROWS, HEADS, ROPE)
KEY, KEY_ROPE = rand(BATCH, KEYS, GROUPS, WIDTH, seed=1), rand(BATCH, KEYS, GROUPS, ROPE, seed=2)
VALUE = rand(BATCH, KEYS, GROUPS, WIDE, seed=3)
TABLE = torch.tensor([[4, 0, 7], [2, 8, -1], [1, 6, 3]], dtype=torch.int32)  # behind a request's blocks is anything
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
Q_LENGTHS, K_LENGTHS = [5, 2, 4], [9, 8, 4]


def laid_out(x: Tensor, layout: str, lengths: list[int]) -> Tensor:
    """``x [B, S, N, D]`` in another layout."""
    if layout == "BSND":
        return x
    if layout == "BSH":
        return x.flatten(2)
    if layout == "BNSD":
        return x.transpose(1, 2).contiguous()
    rows = torch.cat([x[b, :n] for b, n in enumerate(lengths)])
    return rows if layout == "TND" else rows.transpose(0, 1).contiguous()


def paged(x: Tensor, flat: bool) -> Tensor:
    """``x [B, S, N, D]`` in blocks: ``[blocks, N, size, D]``, or ``[blocks, size, N * D]`` if ``flat``."""
    blocks = rand(9, SIZE, *x.shape[2:], seed=8)
    for b in range(BATCH):
        for place in range(K_LENGTHS[b]):
            blocks[TABLE[b, place // SIZE], place % SIZE] = x[b, place]
    return blocks.flatten(2) if flat else blocks.transpose(1, 2).contiguous()


def expected(seen: Any, rope: bool, rows: list[int] = Q_LENGTHS, keys: list[int] = K_LENGTHS) -> Tensor:
    """``[B, S, N, Dv]``: ``seen(b, row, rows, keys)`` are the keys that a row sees; rows behind a request's are NaN."""
    out = torch.full((BATCH, ROWS, HEADS, WIDE), torch.nan)
    for b in range(BATCH):
        for row in range(rows[b]):
            places = seen(b, row, rows[b], keys[b])
            for h in range(HEADS):
                group = h // (HEADS // GROUPS)
                scores = KEY[b, places, group] @ QUERY[b, row, h]
                if rope:
                    scores = scores + KEY_ROPE[b, places, group] @ QUERY_ROPE[b, row, h]
                weights = (SCALE * scores).softmax(0) if places else scores
                out[b, row, h] = weights @ VALUE[b, places, group]
    return out


def everything(b: int, row: int, rows: int, keys: int) -> list[int]:
    return list(range(keys))


def left_up(b: int, row: int, rows: int, keys: int) -> list[int]:
    return list(range(min(row + 1, keys)))


def right_down(b: int, row: int, rows: int, keys: int) -> list[int]:
    return list(range(max(keys - rows + row + 1, 0)))


MASK = torch.rand(BATCH, 1, ROWS, KEYS, generator=torch.Generator().manual_seed(0)) < 0.4
MASK[1, 0, 1] = True  # a row that sees no key


def masked(b: int, row: int, rows: int, keys: int) -> list[int]:
    return [k for k in range(keys) if not MASK[b, 0, row, k]]


def masked_alike(b: int, row: int, rows: int, keys: int) -> list[int]:
    return [k for k in range(keys) if not MASK[0, 0, row, k]]


MODES = {
    "all keys": (0, None, everything),
    "a mask each": (0, MASK, masked),
    "all mask": (1, MASK.to(torch.uint8), masked),
    "a mask for all": (0, MASK[0, 0], masked_alike),
    "left-up causal": (2, TRIANGLE, left_up),
    "right-down causal": (3, TRIANGLE.to(torch.int8), right_down),
}


def ends(lengths: list[int]) -> list[int]:
    return torch.tensor(lengths).cumsum(0).tolist()


def attended(layout: str, mode: int = 0, mask: Tensor | None = None, rope: bool = False, **said: Any) -> Tensor:
    """The op on the tensors above; ``pages`` "heads" or "flat", ``rows`` and ``keys`` lengths, else all rows."""
    rows, keys, pages = said.pop("rows", Q_LENGTHS), said.pop("keys", K_LENGTHS), said.pop("pages", "")
    of, k_of = layout.partition("_")[0], rows if rows is not None else [ROWS] * BATCH

    def kv(x: Tensor) -> Tensor:
        return paged(x, pages == "flat") if pages else laid_out(x, of, keys or [KEYS] * BATCH)

    inputs = {
        "query": laid_out(QUERY, of, k_of), "key": [kv(KEY)], "value": [kv(VALUE)], "atten_mask": mask,
        "actual_seq_lengths": None if rows is None else torch.tensor(ends(rows) if of == "TND" else rows),
        "actual_seq_lengths_kv": None if keys is None else torch.tensor(
            ends(keys) if of == "TND" and not pages else keys
        ),
        "block_table": TABLE if pages else None, "query_rope": laid_out(QUERY_ROPE, of, k_of) if rope else None,
        "key_rope": kv(KEY_ROPE) if rope else None,
    }  # fmt: skip
    attrs = {"num_heads": HEADS, "num_key_value_heads": GROUPS, "input_layout": layout, "scale": SCALE}
    attrs |= {"block_size": SIZE} if pages else {}
    inputs |= said.pop("inputs", {})
    return run_op("FusedInferAttentionScore", inputs, 2, **{**attrs, "sparse_mode": mode, **said})[0]


LAYOUTS = ["TND", "BSND", "BNSD", "BSH", "BNSD_BSND", "TND_NTD"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("pages", ["", "heads", "flat"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_attends_to_the_keys_that_it_sees(layout: str, pages: str, rope: bool, mode: str) -> None:
    number, mask, seen = MODES[mode]
    call = {"layout": layout, "mode": number, "mask": mask, "rope": rope, "pages": pages}
    if layout.startswith("TND") and mask is not None and number < 2:
        with pytest.raises(GeError, match="atten_mask of layout TND: expected sparse_mode 2 or 3"):
            attended(**call)
        return
    wanted = laid_out(expected(seen, rope), layout.rpartition("_")[2], Q_LENGTHS)
    torch.testing.assert_close(attended(**call), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
def test_requests_are_whole_where_no_lengths_are_given(layout: str) -> None:
    wanted = expected(right_down, False, [ROWS] * BATCH, [KEYS] * BATCH)
    found = attended(layout, 3, TRIANGLE, rows=None, keys=None)
    torch.testing.assert_close(found, laid_out(wanted, layout, []), rtol=1e-5, atol=1e-5)


def test_a_request_without_rows_and_one_without_keys() -> None:
    rows, keys = [5, 0, 4], [9, 8, 0]
    found = attended("TND", rows=rows, keys=keys)
    wanted = laid_out(expected(everything, False, rows, keys), "TND", rows)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not found[5:].any()  # a row without keys is zero


@pytest.mark.parametrize("mode", ["left-up causal", "right-down causal"])
def test_rows_ahead_of_all_keys_see_none(mode: str) -> None:
    """Right-down, as there are fewer keys than rows; left-up, the first row sees the first key."""
    number, mask, seen = MODES[mode]
    rows, keys = [5, 2, 4], [3, 1, 4]
    wanted = expected(seen, False, rows, keys)
    found = attended("BSND", number, mask, rows=rows, keys=keys)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_keys_have_as_many_heads_as_queries_unless_said() -> None:
    inputs = {"query": QUERY, "key": [QUERY], "value": [QUERY]}
    found = run_op("FusedInferAttentionScore", inputs, 2, num_heads=HEADS, input_layout="BSND")[0]
    weights = torch.einsum("brhd,bkhd->bhrk", QUERY, QUERY).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bhrk,bkhd->brhd", weights, QUERY), rtol=1e-5, atol=1e-5)


def test_sparse_attention_over_all_keys_is_this_one() -> None:
    t = test_ge_attention
    every = torch.arange(max(t.KEY_LENGTHS)).expand(t.ROWS, -1)
    cache, ropes = (part.transpose(1, 2).contiguous() for part in (t.CACHE, t.ROPES))
    inputs = {
        "query": t.QUERY, "key": [cache], "value": [cache], "atten_mask": TRIANGLE,
        "actual_seq_lengths": torch.tensor(t.QUERY_ENDS), "actual_seq_lengths_kv": torch.tensor(t.KEY_LENGTHS),
        "block_table": t.TABLE, "query_rope": t.QUERY_ROPE, "key_rope": ropes,
    }  # fmt: skip
    attrs = {"num_heads": t.HEADS, "num_key_value_heads": 1, "input_layout": "TND", "block_size": t.SIZE}
    found = run_op("FusedInferAttentionScore", inputs, 2, **attrs, scale=t.SCALE, sparse_mode=3)[0]
    torch.testing.assert_close(t.attended(indices=every), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attended("SBH"), "attribute 'input_layout': expected 'TND' or 'BSND' or"),
        (lambda: attended("BSND", 4, TRIANGLE), "attribute 'sparse_mode': expected 0 or 1 or 2 or 3, found 4"),
        (lambda: attended("BSND", 1), "sparse_mode 1: expected atten_mask, found none"),
        (lambda: attended("BSND", 3), "sparse_mode 3: expected atten_mask, found none"),
        (lambda: attended("BSND", 2, TRIANGLE.T.contiguous()), "expected the upper triangle that sparse_mode 2 reads"),
        (lambda: attended("BSND", 3, TRIANGLE[:9, :9]), r"atten_mask: expected \[2048, 2048\], found \[9, 9\]"),
        (lambda: attended("BSND", 0, MASK[:, :, :1]), r"atten_mask: expected 5 rows of 9 keys, found \[3, 1, 1, 9\]"),
        (lambda: attended("BSND", 0, MASK[..., :8]), "atten_mask: expected 5 rows of 9 keys"),
        (lambda: attended("BSND", 0, MASK[:2]), r"atten_mask: expected 5 rows of 4 keys, found \[2, 1, 5, 9\]"),
        (lambda: attended("BSND", 0, MASK.expand(-1, 4, -1, -1)), "atten_mask: expected one for all heads"),
        (lambda: attended("BSND", pages="heads", block_size=128), "'block_size': expected 4, found 128"),
        (lambda: attended("BSND", pages="heads", num_key_value_heads=4), "expected a cache of 4 heads"),
        (lambda: attended("BSND", pages="heads", keys=[9, 9, 4]), "block_table names blocks beyond 9"),
        (lambda: attended("BSND", pages="heads", keys=[13, 8, 4]), "block_table: expected blocks for 13 keys"),
        (lambda: attended("TND", pages="heads", keys=None), "layout PA_BSND: expected key lengths, found none"),
        (lambda: attended("TND", keys=None), "layout TND: expected key lengths, found none"),
        (lambda: attended("BSND", keys=[10, 8, 4]), "expected at most 9 keys, found 10"),
        (lambda: attended("BSND", rows=[6, 2, 4]), r"expected lengths of 3 requests of 5 rows, found \[6, 2, 4\]"),
        (lambda: attended("BSND", rows=[5, 2]), r"expected lengths of 3 requests of 5 rows, found \[5, 2\]"),
        (lambda: attended("BSND", num_heads=2), r"expected 2 heads of BSND, found \[3, 5, 4, 6\]"),
        (lambda: attended("BSND", softmax_lse_flag=True), "'softmax_lse_flag': expected False, found True"),
        (lambda: attended("BSND", pre_tokens=7), "'pre_tokens': expected 2147483647, found 7"),
        (lambda: attended("BSND", next_tokens=0), "'next_tokens': expected 2147483647, found 0"),
        (lambda: attended("BSND", out_dtype=1), "'out_dtype': expected 0, found 1"),
        (lambda: attended("BSND", inputs={"key": [KEY, KEY]}), "expected one tensor of keys and one of values"),
    ],
)  # fmt: skip
def test_what_the_reference_does_not_have_and_what_does_not_fit_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((f"{kind}_scale{n}", torch.float32) for kind, n in (("dequant", 1), ("quant", 1), ("dequant", 2))),
        *((f"{of}antiquant_{part}", torch.float32) for of in ("", "key_", "value_") for part in ("scale", "offset")),
        *((f"{of}_padding_size", torch.int64) for of in ("query", "kv")),
        *((f"{of}_shared_prefix", torch.float32) for of in ("key", "value")),
        *((f"{of}_start_idx", torch.int64) for of in ("q", "kv")),
        ("actual_shared_prefix_len", torch.int64),
        ("pse_shift", torch.float32),
        ("quant_offset2", torch.float32),
        ("learnable_sink", torch.bfloat16),
        ("dequant_scale_query", torch.float32),
        ("key_rope_antiquant_scale", torch.float32),
    ],
)
def test_an_input_that_the_reference_does_not_have_is_an_error(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(GeError, match=f"input {name!r} is not part of the reference"):
        attended("BSND", inputs={name: torch.ones(1, dtype=dtype)})


def test_a_result_of_half_precision_is_rounded_once() -> None:
    halves = [part.bfloat16() for part in (QUERY, KEY, VALUE)]
    inputs = dict(zip(("query", "key", "value"), (halves[0], [halves[1]], [halves[2]]), strict=True))
    wide = {"query": inputs["query"].float(), "key": [halves[1].float()], "value": [halves[2].float()]}
    attrs = {"num_heads": HEADS, "num_key_value_heads": GROUPS, "input_layout": "BSND"}
    found, exact = (run_op("FusedInferAttentionScore", given, 2, **attrs)[0] for given in (inputs, wide))
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
