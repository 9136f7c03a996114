"""Elementwise GE ops: one result for each element of operands that broadcast and have one dtype.

Prototypes: CANN's ``elewise_calculation_ops.h``, ``nonlinear_fuc_ops.h`` and ``selection_ops.h``, which torchair's
``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.signatures import FLOAT, INTEGER, NUMBER, DType, expect, op

_SUM = f"{NUMBER}|bool"


@op("Add", "T, T -> y:T", T=NUMBER)
def add(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 + x2``, broadcast. Source: REG_OP(Add)."""
    return x1 + x2


@op("Sub", "T, T -> y:T", T=NUMBER)
def sub(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 - x2``, broadcast. Source: REG_OP(Sub)."""
    return x1 - x2


@op("Mul", "T, T -> y:T", T=_SUM)
def mul(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 * x2``, broadcast; on bool, both. Source: REG_OP(Mul); its pairs of unlike dtypes are refused."""
    return x1 & x2 if x1.dtype == torch.bool else x1 * x2


@op("Muls", "T -> y:T", T=FLOAT)
def muls(x: Tensor, *, value: float) -> Tensor:
    """``x * value``, rounded once. Source: REG_OP(Muls); torchair writes it for half precision."""
    return x * value


@op("RealDiv", "T, T -> y:T", T=FLOAT)
def real_div(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 / x2`` of floating-point operands, broadcast. Source: REG_OP(RealDiv)."""
    return x1 / x2


@op("Div", "T, T -> y:T", T=NUMBER)
def div(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 / x2``; of integers the quotient without its fraction, where both ways to round it agree.

    Source: REG_OP(Div), which does not say how a negative quotient of integers is rounded; it is refused.
    """
    if x1.dtype.is_floating_point:
        return x1 / x2
    expect(bool((x1 >= 0).all() and (x2 > 0).all()), "expected integers that are not negative, over positive ones")
    return torch.div(x1, x2, rounding_mode="floor")


@op("FloorDiv", "T, T -> y:T", T=NUMBER)
def floor_div(x1: Tensor, x2: Tensor) -> Tensor:
    """The quotient rounded towards minus infinity. Source: REG_OP(FloorDiv), as TensorFlow's FloorDiv."""
    return torch.div(x1, x2, rounding_mode="floor")


@op("FloorMod", "T, T -> y:T", T="int32|int64|float32|float16|float64")
def floor_mod(x1: Tensor, x2: Tensor) -> Tensor:
    """The remainder of the division that is rounded towards minus infinity. Source: REG_OP(FloorMod)."""
    return torch.remainder(x1, x2)


@op("Mod", "T, T -> y:T", T=NUMBER)
def mod(x1: Tensor, x2: Tensor) -> Tensor:
    """The remainder of the division that is rounded towards zero, as C's. Source: REG_OP(Mod)."""
    return torch.fmod(x1, x2)


@op("TruncateDiv", "T, T -> y:T", T=NUMBER)
def truncate_div(x1: Tensor, x2: Tensor) -> Tensor:
    """The quotient rounded towards zero. Source: REG_OP(TruncateDiv)."""
    return torch.div(x1, x2, rounding_mode="trunc")


@op("Pow", "T, T -> y:T", T=NUMBER)
def power(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 ** x2``, broadcast. Source: REG_OP(Pow); operands of unlike dtypes are refused, as for Mul."""
    return torch.pow(x1, x2)


@op("Maximum", "T, T -> y:T", T=NUMBER)
def maximum(x1: Tensor, x2: Tensor) -> Tensor:
    """The larger of both, broadcast. Source: REG_OP(Maximum)."""
    return torch.maximum(x1, x2)


@op("Minimum", "T, T -> y:T", T=NUMBER)
def minimum(x1: Tensor, x2: Tensor) -> Tensor:
    """The smaller of both, broadcast. Source: REG_OP(Minimum)."""
    return torch.minimum(x1, x2)


@op("Equal", "T, T -> y:bool", T=_SUM)
def equal(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 == x2``, broadcast. Source: REG_OP(Equal)."""
    return x1 == x2


@op("NotEqual", "T, T -> y:bool", T=_SUM)
def not_equal(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 != x2``, broadcast. Source: REG_OP(NotEqual)."""
    return x1 != x2


@op("Less", "T, T -> y:bool", T=NUMBER)
def less(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 < x2``, broadcast. Source: REG_OP(Less)."""
    return x1 < x2


@op("LessEqual", "T, T -> y:bool", T=NUMBER)
def less_equal(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 <= x2``, broadcast. Source: REG_OP(LessEqual)."""
    return x1 <= x2


@op("Greater", "T, T -> y:bool", T=NUMBER)
def greater(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 > x2``, broadcast. Source: REG_OP(Greater)."""
    return x1 > x2


@op("GreaterEqual", "T, T -> y:bool", T=NUMBER)
def greater_equal(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 >= x2``, broadcast. Source: REG_OP(GreaterEqual)."""
    return x1 >= x2


@op("LogicalAnd", "bool, bool -> y:bool")
def logical_and(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 and x2``, broadcast. Source: REG_OP(LogicalAnd)."""
    return x1 & x2


@op("LogicalOr", "bool, bool -> y:bool")
def logical_or(x1: Tensor, x2: Tensor) -> Tensor:
    """``x1 or x2``, broadcast. Source: REG_OP(LogicalOr)."""
    return x1 | x2


@op("LogicalNot", "bool -> y:bool")
def logical_not(x: Tensor) -> Tensor:
    """``not x``. Source: REG_OP(LogicalNot)."""
    return ~x


@op("BitwiseAnd", "T, T -> y:T", T=INTEGER)
def bitwise_and(x1: Tensor, x2: Tensor) -> Tensor:
    """The bits that both have. Source: REG_OP(BitwiseAnd)."""
    return x1 & x2


@op("BitwiseOr", "T, T -> y:T", T=INTEGER)
def bitwise_or(x1: Tensor, x2: Tensor) -> Tensor:
    """The bits that either has. Source: REG_OP(BitwiseOr)."""
    return x1 | x2


@op("Neg", "T -> y:T", T="bfloat16|float16|float32|float64|int32|int64")
def neg(x: Tensor) -> Tensor:
    """``-x``. Source: REG_OP(Neg)."""
    return -x


@op("Abs", "T -> y:T", T=NUMBER)
def absolute(x: Tensor) -> Tensor:
    """``|x|``. Source: REG_OP(Abs)."""
    return x.abs()


@op("Relu", "T -> y:T", T=NUMBER)
def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``. Source: REG_OP(Relu)."""
    return x.relu()


@op("Exp", "T -> y:T", T=FLOAT)
def exp(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """``base ** (scale * x + shift)``; a base of -1 stands for e. Source: REG_OP(Exp)."""
    expect(base == -1.0 or base > 0, f"attribute 'base': expected -1 or a positive number, found {base}")
    y = x * scale + shift
    return y.exp() if base == -1.0 else torch.pow(base, y)


@op("Log", "T -> y:T", T=FLOAT)
def log(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """The logarithm of ``scale * x + shift`` to ``base``; -1 stands for e. Source: REG_OP(Log)."""
    expect(base == -1.0 or base > 0, f"attribute 'base': expected -1 or a positive number, found {base}")
    y = (x * scale + shift).log()
    return y if base == -1.0 else y / torch.log(torch.tensor(base, dtype=x.dtype))


@op("Sqrt", "T -> y:T", T=FLOAT)
def sqrt(x: Tensor) -> Tensor:
    """The square root. Source: REG_OP(Sqrt)."""
    return x.sqrt()


@op("Rsqrt", "T -> y:T", T=FLOAT)
def rsqrt(x: Tensor) -> Tensor:
    """One over the square root. Source: REG_OP(Rsqrt)."""
    return x.rsqrt()


@op("Reciprocal", "T -> y:T", T=FLOAT)
def reciprocal(x: Tensor) -> Tensor:
    """``1 / x``. Source: REG_OP(Reciprocal)."""
    return x.reciprocal()


@op("Cos", "T -> y:T", T=FLOAT)
def cos(x: Tensor) -> Tensor:
    """The cosine of radians. Source: REG_OP(Cos)."""
    return x.cos()


@op("Sin", "T -> y:T", T=FLOAT)
def sin(x: Tensor) -> Tensor:
    """The sine of radians. Source: REG_OP(Sin)."""
    return x.sin()


@op("Sigmoid", "T -> y:T", T=FLOAT)
def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``. Source: REG_OP(Sigmoid)."""
    return x.sigmoid()


@op("Swish", "T -> y:T", T="float16|bfloat16|float32")
def swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """``x * sigmoid(scale * x)``. Source: REG_OP(Swish)."""
    return torch.nn.functional.silu(x) if scale == 1.0 else x * (x * scale).sigmoid()


@op("SwiGlu", "T -> y:T", T="float16|bfloat16|float32")
def swi_glu(x: Tensor, *, dim: int = -1) -> Tensor:
    """``silu(a) * b`` of the halves ``a`` and ``b`` of ``x`` along ``dim``; half precisions in float32.

    Source: REG_OP(SwiGlu); aclnnSwiGlu, "Swish(A) * B".
    """
    expect(x.shape[dim] % 2 == 0, f"expected an even size of dim {dim}, found {x.shape[dim]}")
    a, b = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(a) * b).to(x.dtype)


@op("Cast", "any -> y:=dst_type")
def cast(x: Tensor, *, dst_type: DType) -> Tensor:
    """Convert the dtype: a fraction is cut off, and to bool everything but 0 is true. Source: REG_OP(Cast)."""
    return x.to(dst_type)


@op("SelectV2", "bool, T, T -> result:T")
def select_v2(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    """``then`` where ``condition`` holds, ``else`` elsewhere; all three broadcast. Source: REG_OP(SelectV2)."""
    return torch.where(condition, then, else_)


@op("Select", "bool, T, T -> y:T")
def select(condition: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """``x1`` where ``condition`` holds, else ``x2``, of one shape; a vector chooses rows. Source: REG_OP(Select)."""
    expect(x1.shape == x2.shape, f"expected operands of one shape, found {list(x1.shape)} and {list(x2.shape)}")
    if condition.ndim == 1 and x1.ndim > 1:
        condition = condition.view(-1, *[1] * (x1.ndim - 1))
    else:
        expect(condition.shape == x1.shape, f"expected a condition of {list(x1.shape)}, found {list(condition.shape)}")
    return torch.where(condition, x1, x2)


@op("MaskedFill", "T, bool, T -> y:T")
def masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """``value``, one number, where ``mask``, which broadcasts, holds. Source: REG_OP(MaskedFill)."""
    expect(value.numel() == 1, f"expected one value, found {list(value.shape)}")
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return torch.where(mask, value.reshape(()), x).expand(shape)


@op("ClipByValueV2", "T, T, T -> y:T", T=NUMBER)
def clip_by_value(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    """``x`` between both bounds, which broadcast. Source: REG_OP(ClipByValueV2)."""
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max)


@op("ZerosLike", "T -> y:T")
def zeros_like(x: Tensor) -> Tensor:
    """Zeros of the operand's shape and dtype. Source: REG_OP(ZerosLike)."""
    return torch.zeros_like(x)


@op("OnesLike", "T -> y:T")
def ones_like(x: Tensor) -> Tensor:
    """Ones of the operand's shape and dtype. Source: REG_OP(OnesLike)."""
    return torch.ones_like(x)
