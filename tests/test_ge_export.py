"""GE graphs of whole small models: every op has a form, and the sequence around a layer is what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from ascend_process import AscendProcess
from ge_layers import dispatched, exported_by_backend, lowered, served, shared_o_proj, specialised

from cpcompile.errors import AscendError, OptionError
from cpcompile.options import Options

PAIR, FOUR = " tag=ptd:0;rank_list=0,1", " tag=ptd:0;rank_list=0,1,2,3"


def sequence(*parts: str) -> str:
    """``"RmsNorm, 2 MatMul"`` as a line for each op."""
    lines = []
    for part in ", ".join(parts).split(", "):
        count, _, op = part.rpartition(" ") if part[0].isdigit() else ("1", "", part)
        lines += [op] * int(count)
    return "\n".join(lines) + "\n"


def ops(found: dict[str, Any], group: str) -> str:
    return str(found["text"]).replace(group, "")


ATTENTION = "RmsNorm, MatMul, SoftmaxV2, MatMul"
EXPERTS = "MoeInitRoutingV3, GroupedMatmul, SwiGlu, GroupedMatmul, MoeFinalizeRoutingV2"


def test_tensor_parallel(ascend: AscendProcess) -> None:
    found = ascend(lowered, "v3", "off")
    attention = "MatMul, RmsNorm, 2 MatMul, RmsNorm, MatMul, SoftmaxV2, MatMul, HcomAllReduce, AddRmsNorm"
    assert ops(found, PAIR) == sequence(
        "HcomAllReduce, RmsNorm", attention, "MatMul, Swish, 2 MatMul, HcomAllReduce, AddRmsNorm",
        attention, "MatMul, MoeGatingTopK", EXPERTS,
        "HcomAllReduce, MatMul, Swish, 2 MatMul, HcomAllReduce, AddRmsNorm, MatMul, HcomAllGather",
    )  # fmt: skip
    assert not found["unsupported"]
    assert [(c["ranks"], c["sends"]) for c in found["collectives"][:2]] == [([0, 1], "512*s27")] * 2


def test_reduce_scatter_and_the_gather_of_latents(ascend: AscendProcess) -> None:
    found = ascend(lowered, "v3", "tp")
    attention = (
        "MatMul, RmsNorm, MatMul, RmsNorm, HcomAllGather, 2 MatMul, SoftmaxV2, MatMul, HcomReduceScatter, AddRmsNorm"
    )
    assert ops(found, PAIR) == sequence(
        "HcomReduceScatter, RmsNorm", attention,
        "HcomAllGather, MatMul, Swish, 2 MatMul, HcomReduceScatter, AddRmsNorm",
        attention, "MatMul, MoeGatingTopK, 3 HcomAllGather", EXPERTS,
        "MatMul, Swish, 2 MatMul, HcomReduceScatter, AddRmsNorm, HcomAllGather, MatMul, HcomAllGather",
    )  # fmt: skip
    gather = found["collectives"][1]
    # The normed query latent 256 and the key latent with its rotated part, 16 + 8, in bfloat16.
    assert (gather["op"], gather["sends"]) == ("HcomAllGather", "560*(((s27 + 1)//2))")


def test_sparse_attention(ascend: AscendProcess) -> None:
    found = ascend(lowered, "v32", "tp")
    assert not found["unsupported"]
    text = ops(found, PAIR)
    assert text.count("LightningIndexer\nHcomAllGather\nSparseFlashAttention\n") == 2


def test_matmuls_take_their_collectives_along(ascend: AscendProcess) -> None:
    found = ascend(lowered, "v3", "tp", True)
    attention = "MatMul, RmsNorm, MatMul, RmsNorm, HcomAllGather, 2 MatMul, SoftmaxV2, MatmulReduceScatter, AddRmsNorm"
    assert ops(found, PAIR) == sequence(
        "HcomReduceScatter, RmsNorm", attention, "AllGatherMatmul, Swish, MatMul, MatmulReduceScatter, AddRmsNorm",
        attention, "MatMul, MoeGatingTopK, AllGatherMatmul, 2 HcomAllGather", EXPERTS,
        "Swish, 2 MatMul, HcomReduceScatter, AddRmsNorm, AllGatherMatmul, HcomAllGather",
    )  # fmt: skip
    rows = [(c["op"], c["group"], c["ranks"]) for c in found["collectives"] if c["op"].startswith("Matmul")]
    assert rows == [("MatmulReduceScatter", PAIR.strip(), [0, 1])] * 3
    assert all(c["sends"] and c["group"] for c in found["collectives"])


def test_an_o_proj_that_four_ranks_share(ascend: AscendProcess) -> None:
    """Rows of each rank's heads go to all ranks, and come back summed; nothing else talks."""
    found = ascend(shared_o_proj)
    assert ops(found, FOUR) == sequence(
        "RmsNorm, MatMul, RmsNorm, 2 MatMul, RmsNorm, MatMul, SoftmaxV2",
        "HcomAllToAllV, MatMul, HcomReduceScatter, AddRmsNorm, MatMul, Swish, 2 MatMul, AddRmsNorm, MatMul",
    )
    assert [row["ranks"] for row in found["collectives"]] == [[0, 1, 2, 3]] * 2
    assert not found["unsupported"]


def test_rows_go_to_their_experts_and_back(ascend: AscendProcess) -> None:
    """Over a group of their own; only keys and logits are gathered."""
    found = ascend(dispatched, 33)
    (own,) = {row["group"] for row in found["collectives"] if row["op"].startswith("Moe")}
    assert own != PAIR.strip()
    attention = "MatMul, RmsNorm, 2 MatMul, RmsNorm, HcomAllGather, MatMul, SoftmaxV2, MatMul, AddRmsNorm"
    assert ops(found, PAIR).replace(f" {own}", "") == sequence(
        "RmsNorm", attention, "MatMul, MoeGatingTopK, MatMul, Swish, 2 MatMul",
        "MoeDistributeDispatchV2, GroupedMatmul, SwiGlu, GroupedMatmul, MoeDistributeCombineV2",
        "AddRmsNorm, MatMul, HcomAllGather",
    )  # fmt: skip
    assert [row["ranks"] for row in found["collectives"]] == [[0, 1]] * 4 and not found["unsupported"]


MLA = (
    "AddRmsNorm, MatMul, RmsNorm, MatMul, InterleaveRope, RmsNorm",
    "InterleaveRope",
    "MatMul, InterleaveRope, MatMul, LayerNormV4, InterleaveRope",
    "MatMul",
    "LightningIndexer, SparseFlashAttention, MatMul, AddRmsNorm, MatMul, SwiGlu, MatMul",
)


@pytest.mark.parametrize(("layout", "last"), [("contiguous", "HcomAllReduce"), ("zigzag", "HcomAllGather")])
def test_context_parallel_with_one_gather(ascend: AscendProcess, layout: str, last: str) -> None:
    found = ascend(served, "Layer", layout)
    write = "ScatterNdUpdate"
    # The first layer's keys are of what every rank has; from the second on, one gather brings them together.
    first = (MLA[0], write, MLA[1], write, MLA[2], write, MLA[3], MLA[4])
    second = (MLA[0], MLA[1], MLA[2], MLA[3], "HcomAllGather", write, write, write, MLA[4])
    assert ops(found, FOUR) == sequence(*first, *second, "AddRmsNorm", last, "MatMul")
    assert not found["unsupported"]


def test_dense_attention_of_the_serving_form(ascend: AscendProcess) -> None:
    found = ascend(served, "DenseLayer", "contiguous")
    assert not found["unsupported"]
    assert found["ops"]["FusedInferAttentionScore"] == 2


def test_a_static_graph_has_no_sizes_to_compute(ascend: AscendProcess) -> None:
    found = ascend(specialised, 7)
    assert not found["unsupported"]
    assert "FloorDiv" not in found["ops"]
    shapes = {tuple(row["shape"]) for row in found["inputs"]}
    assert (1, 7) in shapes and not any(-1 in shape for shape in shapes)


def test_files_and_names(ascend: AscendProcess) -> None:
    found = ascend(lowered, "v3", "tp")
    assert found["files"] == ["dynamo.pbtxt", "model.pb", "options.json", "summary.json"]
    numbers: Sequence[Any] = [row["of"] for row in found["inputs"]]
    assert len(set(map(str, numbers))) == len(numbers)
    assert found["outputs"] == [0]


def test_the_backend_exports_and_runs_nothing(ascend: AscendProcess) -> None:
    with pytest.raises(AscendError, match=r"^target 'ge-export' runs nothing: the GE graph is in .*from_0$"):
        ascend(exported_by_backend)


def test_a_folder_is_needed() -> None:
    with pytest.raises(OptionError, match=r"give dump_dir, the folder for them$"):
        Options.parse({"target": "ge-export"})
