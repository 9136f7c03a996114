"""Converters that torchair lacks: of sizes, which are Python's numbers in the graph and tensors of one in GE's."""

from __future__ import annotations

from typing import Any

import torch

# The op of two sizes → GE's op. Torchair has the others (add, sub, mul, floordiv, mod, neg, sym_sum, ...).
OF_SIZES = {torch.sym_min: "Minimum", torch.sym_max: "Maximum"}


def register_missing(torchair: Any) -> None:
    """Give torchair a converter for every op of :data:`OF_SIZES` that it has none for."""
    from torchair._ge_concrete_graph.fx2ge_converter import _get_converter

    for op, name in OF_SIZES.items():
        if _get_converter(op) is None:
            torchair.register_fx_node_ge_converter(op)(_of_two(name))


def _of_two(name: str) -> Any:
    from torchair._ge_concrete_graph import ge_apis
    from torchair._ge_concrete_graph.utils import dtype_promote

    def convert(a: Any, b: Any, meta_outputs: Any = None) -> Any:
        return getattr(ge_apis, name)(*dtype_promote(a, b, target_dtype=meta_outputs.dtype))

    return convert
