"""Each op type of the GE interpreter against torch, on random inputs; attention, experts and collectives have files."""

from __future__ import annotations

from typing import Any

import ge_cases_elementwise
import ge_cases_numbers
import ge_cases_positions
import pytest
import test_ge_attention
import test_ge_collectives
import test_ge_fused_attention
import test_ge_mla
import test_ge_moe
import test_ge_moe_exchange
import torch
from ge_build import attr, one_op, run_op
from ge_cases import BF, CUBE, INT, JNT, B, Case, X, i64, rand, scalar

from cpcompile.lowering.ge import GeError, GeProgram, interpret, op_types

I8 = rand(4, 4, dtype=torch.int8)
CASES = [*ge_cases_elementwise.CASES, *ge_cases_positions.CASES, *ge_cases_numbers.CASES]
ELSEWHERE = (
    test_ge_attention, test_ge_collectives, test_ge_fused_attention, test_ge_mla, test_ge_moe, test_ge_moe_exchange,
)  # fmt: skip
OTHERS = {op_type for module in ELSEWHERE for op_type in module.COVERED}


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.type}" for i, case in enumerate(CASES)])
def test_an_op_gives_what_torch_gives(case: Case) -> None:
    expected = case.expected if isinstance(case.expected, tuple) else (case.expected,)
    fed = {
        name: [t.clone() for t in v] if isinstance(v, list) else None if v is None else v.clone()
        for name, v in case.inputs.items()
    }
    for found, wanted in zip(run_op(case.type, fed, len(expected), **case.attrs), expected, strict=True):
        if wanted is not None:
            # Functions that torch approximates may differ in the last place.
            close = case.within or (1e-6 if wanted.dtype.is_floating_point else 0)
            torch.testing.assert_close(found, wanted, rtol=close, atol=close, equal_nan=True)


def test_every_op_type_has_a_case() -> None:
    assert {case.type for case in CASES} | OTHERS == op_types()


def test_an_op_type_that_is_not_known_is_an_error_and_never_skipped() -> None:
    with pytest.raises(GeError, match=r"op 'tested' \(Swoosh\): unknown op type \(did you mean 'Swish'\?\)"):
        run_op("Swoosh", {"x": X})


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        ("MatMul", {"x1": X, "x2": B}, {"transpose_x3": True}, r"unknown attribute 'transpose_x3' = True \(did you"),
        ("MatMul", {"x1": X, "x2": B}, {"transpose_x2": 1}, "attribute 'transpose_x2': expected bool, found i 1"),
        ("Pack", {"x": [X]}, {}, "expected attribute 'N', found none"),
        ("Pack", {"x": [X, X]}, {"N": 3}, "attribute 'N': expected 2 as there are inputs, found 3"),
        ("Cast", {"x": X}, {"dst_type": 1000}, "attribute 'dst_type': expected the number of a dtype"),
        ("Reshape", {"x": X, "shape": i64(12)}, {"axis": 1}, "attribute 'axis': expected 0, found 1"),
        (
            "StridedSliceV2",
            {"x": X, "begin": i64(0), "end": i64(1)},
            {"new_axis_mask": 1},
            "'new_axis_mask': expected 0",
        ),
        ("Gather", {"x": X, "indices": i64(0)}, {"batch_dims": 1}, "attribute 'batch_dims': expected 0, found 1"),
        (
            "GatherV2",
            {"x": X, "indices": i64(0), "axis": i64(1)},
            {"batch_dims": 1},
            "attribute 'batch_dims': expected 0",
        ),
        ("RotaryPositionEmbedding", {"x": CUBE, "cos": CUBE, "sin": CUBE}, {"mode": 2}, "'mode': expected 0 or 1 or 3"),
        ("Sort", {"x": X}, {"axis": 0}, "attribute 'axis': expected the last dim, found 0"),
        ("SoftmaxV2", {"x": X}, {"axes": [0, 1]}, r"attribute 'axes': expected one dim, found \[0, 1\]"),
        ("Histogram", {"x": X}, {"min": 1.0, "max": 1.0}, "expected 'min' below 'max', found 1.0 and 1.0"),
        ("DynamicQuant", {"x": X}, {"dst_type": torch.int32}, "attribute 'dst_type': expected torch.int8"),
        ("AscendQuantV2", {"x": X, "scale": X[0]}, {"axis": 0}, "attribute 'axis': expected the last dim, found 0"),
        ("AscendQuantV2", {"x": X, "scale": X[0]}, {"round_mode": "floor"}, "'round_mode': expected 'round', found"),
        (
            "Scatter",
            {"var": X, "indices": i64(0), "updates": X},
            {"reduce": "add", "axis": 1},
            "'reduce': expected 'up",
        ),
        ("PadV3", {"x": X, "paddings": i64(0, 0, 0, 0)}, {"mode": "reflect"}, "'mode': expected 'constant', found"),
        (
            "QuantBatchMatmulV4",
            {"x1": I8, "x2": I8, "x2_scale": X[0]},
            {"dtype": torch.bfloat16, "group_size": 32},
            "attribute 'group_size': expected -1 or 0, found 32",
        ),
        (
            "SplitV",
            {"x": X, "size_splits": i64(1, 3), "split_dim": scalar(1)},
            {"num_split": 3},
            "'num_split': expected 2",
        ),
    ],
)
def test_an_attribute_that_the_prototype_lacks_or_the_reference_does_not_mean_is_an_error(
    op_type: str, inputs: Any, attrs: Any, message: str
) -> None:
    with pytest.raises(GeError, match=message):
        run_op(op_type, inputs, **attrs)


@pytest.mark.parametrize(
    ("op_type", "inputs", "message"),
    [
        ("Add", {"x1": X, "x2": X.double()}, "input 'x2': expected float32 as 'x1', found float64; cast it"),
        ("Mul", {"x1": BF, "x2": X}, "input 'x2': expected bfloat16 as 'x1', found float32; cast it"),
        ("MatMul", {"x1": INT, "x2": JNT}, "input 'x1': expected float16.bfloat16.float32, found int64"),
        ("Gather", {"x": X, "indices": X}, "input 'indices': expected int32.int64, found float32"),
        ("SelectV2", {"condition": INT, "then": X, "else": X}, "input 'condition': expected bool, found int64"),
        (
            "Range",
            {"start": scalar(0), "limit": scalar(3.0, torch.float32), "delta": scalar(1)},
            "expected operands of one",
        ),
    ],
)
def test_operands_are_not_promoted(op_type: str, inputs: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        run_op(op_type, inputs)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        ("MatMul", {"x1": X, "x2": B}, {}, "expected inner sizes that agree, found .3, 4. and .5, 4."),
        ("Gather", {"x": X, "indices": i64(3)}, {}, r"expected positions in \[0, 3\), found 3 to 3"),
        ("Gather", {"x": X, "indices": i64(-1)}, {}, r"expected positions in \[0, 3\), found -1 to -1"),
        ("Reshape", {"x": X, "shape": i64(5, 5)}, {}, "failed: shape"),
        ("Transpose", {"x": X, "perm": i64(0, 0)}, {}, "expected an order of 2 dims"),
        ("Div", {"x1": i64(-3), "x2": i64(2)}, {}, "expected integers that are not negative"),
        ("ReduceSum", {"x": X, "axes": i64()}, {}, "expected at least one dim"),
        ("Swish", {"x": X, "y": X}, {}, r"unknown or repeated input 'y' \(known: x\)"),
        ("Add", {"x1": X}, {}, "expected input 'x2', found none"),
        ("MatMul", {"x1": CUBE, "x2": CUBE}, {}, r"expected two matrices, found .2, 3, 4. and .2, 3, 4."),
        ("MatMul", {"x1": X, "x2": X[0]}, {}, r"expected two matrices, found .3, 4. and .4."),
        ("MaskedFill", {"x": X, "mask": X > 0, "value": X[0, :2]}, {}, r"expected one value, found .2."),
        ("Squeeze", {"x": X}, {"axis": [0]}, r"expected size 1 of dim 0, found shape .3, 4."),
        ("Split", {"split_dim": scalar(0, torch.int32), "x": X}, {"num_split": 2}, "expected dim 0 divisible by 2"),
        (
            "StridedSliceV2",
            {"x": X, "begin": i64(2), "end": i64(0), "axes": i64(0), "strides": i64(-1)},
            {},
            r"input 'strides': expected positive numbers, found \[-1\]",
        ),
        ("Pad", {"x": X, "paddings": torch.tensor([[0, 0], [-1, 0]])}, {}, "input 'paddings': expected none below 0"),
        ("IndexByTensor", {"x": X, "indices": [i64(0)]}, {"indices_mask": [1, 1]}, "expected 2 index tensors, found 1"),
        (
            "IndexByTensor",
            {"x": X, "indices": [i64(0), i64(0)]},
            {"indices_mask": [1, 0]},
            "expected 1 index tensors, found 2",
        ),
        (
            "Scatter",
            {"var": X.clone(), "indices": i64(-1, 0, 0), "updates": X[:, :1]},
            {"reduce": "update", "axis": 1},
            r"no 1 elements from -1 in \[3, 4\]",
        ),
        (
            "ScatterPaKvCache",
            {
                "key": CUBE[0, :, None],
                "key_cache": CUBE[..., None, :],
                "slot_mapping": i64(0, 1, 6),
                "value": CUBE[0, :, None],
                "value_cache": CUBE[..., None, :],
                "compress_lens": None,
            },
            {},
            r"expected positions in \[0, 6\), found 0 to 6",
        ),
        (
            "ScatterPaKvCache",
            {
                "key": CUBE[0, :, None],
                "key_cache": CUBE[..., None, :],
                "slot_mapping": i64(0, 1, 2),
                "value": CUBE[0, :, None],
                "value_cache": CUBE[..., None, :],
                "compress_lens": i64(1),
            },
            {},
            "input 'compress_lens' is not part of the reference",
        ),
        ("QuantBatchMatmulV4", {"x1": I8, "x2": I8}, {"dtype": torch.float16}, "expected x2_scale, found none"),
        (
            "QuantBatchMatmulV3",
            {"x1": I8, "x2": I8, "scale": X[0], "offset": X[0]},
            {"dtype": torch.float16},
            "input 'offset' is not part of the reference",
        ),
        (
            "MatMulV2",
            {"x1": X, "x2": X, "offset_w": torch.ones(4, dtype=torch.int8)},
            {},
            "input 'offset_w' is not part of",
        ),
    ],
)
def test_what_an_op_cannot_take_is_an_error(op_type: str, inputs: Any, attrs: Any, message: str) -> None:
    with pytest.raises(GeError, match=f"rank 0: op 'tested' .*: .*{message}"):
        run_op(op_type, inputs, **attrs)


def test_a_result_of_another_dtype_than_the_traced_graph_says_is_an_error() -> None:
    graph, values = one_op("Swish", {"x": X})
    desc = graph.op("tested").output_descs[0]
    desc.dtype, desc.traced = torch.bfloat16, True
    with pytest.raises(GeError, match="output 0: the traced graph expects bfloat16, found float32; a cast is missing"):
        interpret([GeProgram(graph, values)])


def test_what_the_graph_made_up_of_a_result_is_not_held_against_it() -> None:
    graph, values = one_op("Swish", {"x": X})
    desc = graph.op("tested").output_descs[0]
    desc.dtype, desc.traced = torch.bfloat16, False
    interpret([GeProgram(graph, values)])


@pytest.mark.parametrize("names", [("x1", "x1"), ("x2", "x2")])
def test_an_input_that_is_given_twice_is_an_error(names: tuple[str, str]) -> None:
    graph, values = one_op("Add", {"x1": X, "x2": X})
    for desc, name in zip(graph.op("tested").input_descs, names, strict=True):
        desc.name = name
    with pytest.raises(GeError, match=f"unknown or repeated input {names[0]!r}"):
        interpret([GeProgram(graph, values)])


@pytest.mark.parametrize("names", [("x1", "x0"), ("x0", "x2"), ("x0", "xs")])
def test_parts_of_a_dynamic_input_that_are_out_of_order_are_an_error(names: tuple[str, str]) -> None:
    graph, values = one_op("Pack", {"x": [X, X]}, N=2)
    for desc, name in zip(graph.op("tested").input_descs, names, strict=True):
        desc.name = name
    with pytest.raises(GeError, match="unknown or repeated input"):
        interpret([GeProgram(graph, values)])


def test_more_outputs_than_the_op_makes_are_an_error() -> None:
    with pytest.raises(GeError, match="expected at most 1 outputs, found 2"):
        run_op("Swish", {"x": X}, 2)


def test_attributes_that_torchair_adds_for_itself_are_passed_over() -> None:
    graph, values = one_op("Swish", {"x": X})
    graph.op("tested").attrs["_input_name_key"] = attr(["x"])
    interpret([GeProgram(graph, values)])
