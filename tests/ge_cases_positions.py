"""Cases of GE's ops that reduce, order, or take and write at positions."""

from __future__ import annotations

import torch
from ge_cases import (
    BF,
    CUBE,
    INT,
    NO,
    YES,
    Case,
    X,
    i64,
    rand,
    scalar,
)
from torch import Tensor


def written(cache: Tensor, places: list[int], rows: Tensor) -> Tensor:
    out = cache.clone()
    for place, row in zip(places, rows, strict=True):
        if place >= 0:
            out[place // cache.shape[1], place % cache.shape[1]] = row
    return out


PAGES, ROWS = rand(3, 2, 2, 4), rand(5, 2, 4, seed=8)
SLOTS = [4, -1, 0, 3, 5]

CASES = [
    # ---- reductions and order
    Case("ReduceSum", {"x": CUBE, "axes": i64(0, 2)}, sum(CUBE[i, :, j] for i in range(2) for j in range(4)), {}, 1e-5),  # type: ignore[arg-type]
    Case("ReduceMean", {"x": CUBE, "axes": i64(-1)}, CUBE.sum(-1, True) / 4, {"keep_dims": True}, 1e-6),
    Case("ReduceMax", {"x": CUBE, "axes": i64(1)}, CUBE.sort(1).values[:, -1]),
    Case("ReduceMin", {"x": CUBE, "axes": i64(1)}, CUBE.sort(1).values[:, 0]),
    *(
        Case(t, {"x": CUBE, "axes": i64(1)}, function(CUBE), {"keep_dims": True}, 1e-6)
        for t, function in (
            ("ReduceSum", lambda x: (x[:, 0] + x[:, 1] + x[:, 2])[:, None]),
            ("ReduceMax", lambda x: x.sort(1).values[:, -1:]),
            ("ReduceMin", lambda x: x.sort(1).values[:, :1]),
        )
    ),
    Case("ReduceAny", {"x": YES, "axes": i64(1)}, YES.sum(1, True) > 0, {"keep_dims": True}),
    Case("ReduceAll", {"x": YES | NO, "axes": i64(0)}, (YES | NO).sum(0, True) == 3, {"keep_dims": True}),
    Case("ReduceSum", {"x": INT.int(), "axes": i64(1)}, INT.sum(1).int()),
    Case("SoftmaxV2", {"x": BF}, BF.float().softmax(-1).bfloat16(), {"half_to_float": True}, 1e-2),
    Case("TopKV2", {"x": X, "k": scalar(1)}, (X.amax(1, True), X.argmax(1, True)), {"indices_dtype": torch.int64}),
    Case("ReduceAny", {"x": YES, "axes": i64(1)}, YES.sum(1) > 0),
    Case("ReduceAll", {"x": YES | NO, "axes": i64(0)}, (YES | NO).sum(0) == 3),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(1, 3, 6)),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(0, 1, 3), {"exclusive": True}),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(6, 5, 3), {"reverse": True}),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(5, 3, 0), {"reverse": True, "exclusive": True}),
    Case("SoftmaxV2", {"x": CUBE}, CUBE.exp() / CUBE.exp().sum(1, True), {"axes": [1]}, 1e-6),
    Case("SoftmaxV2", {"x": X.half()}, X.half().float().softmax(-1), {"half_to_float": True}, 1e-6),
    Case("TopKV2", {"x": X, "k": scalar(2)}, (X.sort(-1, True).values[:, :2], X.argsort(-1, True)[:, :2].int())),
    Case(
        "TopKV2",
        {"x": X, "k": scalar(2, torch.int32)},
        (X.sort(0).values[:2], X.argsort(0)[:2].int()),
        {"dim": 0, "largest": False},
    ),
    Case("Sort", {"x": i64(3, 1, 3, 2)}, (i64(3, 3, 2, 1), i64(0, 2, 3, 1).int()), {"descending": True}),
    Case("ArgMaxV2", {"x": torch.tensor([[1, 5, 5], [7, 2, 7]]), "dimension": scalar(1)}, i64(1, 0)),
    Case("Histogram", {"x": i64(0, 1, 1, 3).float()}, i64(1, 2, 0, 1).float(), {"bins": 4, "min": 0.0, "max": 3.0}),
    # ---- positions
    Case("Gather", {"x": X, "indices": i64(2, 0)}, torch.stack([X[2], X[0]])),
    Case("Gather", {"x": X, "indices": scalar(-1)}, X[2], {"negative_index_support": True}),
    Case("GatherV2", {"x": CUBE, "indices": torch.tensor([[2, 0]]), "axis": i64(1)}, CUBE[:, [2, 0]][:, None]),
    Case(
        "GatherV2",
        {"x": CUBE, "indices": i64(-1, 0), "axis": i64(2)},
        CUBE[:, :, [3, 0]],
        {"negative_index_support": True},
    ),
    Case("GatherElements", {"x": X, "index": i64(-1, 0)[None]}, torch.stack([X[0, 3], X[0, 0]])[None], {"dim": 1}),
    Case("GatherElements", {"x": X, "index": i64(3, 0)[None]}, torch.stack([X[0, 3], X[0, 0]])[None], {"dim": 1}),
    Case("GatherNd", {"x": CUBE, "indices": torch.tensor([[1, 2], [0, 0]])}, torch.stack([CUBE[1, 2], CUBE[0, 0]])),
    Case(
        "IndexByTensor",
        {"x": CUBE, "indices": [i64(1, 0), i64(3, -1)]},
        CUBE[[1, 0], :, [3, 3]],
        {"indices_mask": [1, 0, 1]},
    ),
    Case(
        "ScatterElements",
        {"data": X, "indices": i64(1, 1, 1, 1)[None], "updates": X[2:]},
        torch.stack([X[0], X[2], X[2]]),
        {"axis": 0, "reduction": "none"},
    ),
    Case(
        "ScatterElements",
        {"data": X, "indices": i64(1, 1, 1, 1)[None], "updates": X[2:]},
        torch.stack([X[0], X[1] + X[2], X[2]]),
        {"axis": 0, "reduction": "add"},
    ),
    Case(
        "ScatterNdUpdate",
        {"var": X, "indices": i64(2, 0)[:, None], "updates": -X[:2]},
        torch.stack([-X[1], X[1], -X[0]]),
    ),
    Case("ScatterUpdate", {"var": X, "indices": i64(2, 0), "updates": -X[:2]}, torch.stack([-X[1], X[1], -X[0]])),
    Case(
        "Scatter",
        {"var": CUBE, "indices": i64(2, 0), "updates": -CUBE[:, :1]},
        torch.stack([torch.cat([CUBE[0, :2], -CUBE[0, :1]]), torch.cat([-CUBE[1, :1], CUBE[1, 1:]])]),
        {"reduce": "update", "axis": 1},
    ),
    Case(
        "ScatterPaKvCache",
        {"key": ROWS, "key_cache": PAGES, "slot_mapping": i64(*SLOTS), "value": -ROWS, "value_cache": PAGES + 1},
        (written(PAGES, SLOTS, ROWS), written(PAGES + 1, SLOTS, -ROWS)),
    ),
]
