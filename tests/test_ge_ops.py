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
from ge_cases import BF, INT, JNT, B, Case, X, i64, scalar

from cpcompile.lowering.ge import GeError, GeProgram, interpret, op_types

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


def test_more_outputs_than_the_op_makes_are_an_error() -> None:
    with pytest.raises(GeError, match="expected at most 1 outputs, found 2"):
        run_op("Swish", {"x": X}, 2)


def test_attributes_that_torchair_adds_for_itself_are_passed_over() -> None:
    graph, values = one_op("Swish", {"x": X})
    graph.op("tested").attrs["_input_name_key"] = attr(["x"])
    interpret([GeProgram(graph, values)])
