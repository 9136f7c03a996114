"""What a cut supposes of products is checked: factors by row, by column or one of the weights' own; sums add up."""

import hand_modules  # noqa: F401  defines the ops
import pytest
import torch
from shared_modules import group_of
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.graph_inputs import GraphInput
from cpcompile.module_runtime import _made
from cpcompile.module_tp import Sharing
from cpcompile.options import Options
from cpcompile.passes.module_cuts import SharedModule, cuts_of, read_beside
from cpcompile.passes.products import product_of
from cpcompile.passes.weight_cuts import Cut, CutRefused
from cpcompile.weights import is_released

aten, npu = torch.ops.aten, torch.ops.npu
ROWS, WIDTH = 6, 32
FP8 = torch.float8_e4m3fn
X8, W8 = torch.ones(ROWS, WIDTH, dtype=torch.int8), torch.ones(WIDTH, WIDTH, dtype=torch.int8)
X, W = torch.ones(ROWS, WIDTH), torch.ones(WIDTH, WIDTH)


def made(f, *inputs, role="o_proj"):
    gm = make_fx(f, tracing_mode="fake")(*inputs)
    (node,) = [n for n in gm.graph.nodes if "mm" in n.name or "matmul" in n.name]
    return gm, node, SharedModule(role, "module", (node.name,), group_of(2, 0), True)


BY_COLUMN, ONE, EIGHT = torch.ones(WIDTH), torch.ones(()), (X.to(FP8), W.to(FP8))


@pytest.mark.parametrize("name", ["offset", "y_scale"])
def test_what_every_summand_would_bring_again(name):
    def f(x, w, scale, extra):
        return npu.npu_quant_matmul(x, w, scale, **{name: extra}, output_dtype=torch.bfloat16)

    gm, node, module = made(f, X8, W8, BY_COLUMN, BY_COLUMN)
    product = product_of(node)
    if product is None:  # a factor that is not known takes the product out of all roles
        assert name == "y_scale"
        return
    with pytest.raises(CutRefused, match=f"has the argument {name}"):
        cuts_of(gm, module)
    gm, _, whole = made(f, X8, W8, BY_COLUMN, BY_COLUMN, role="lm_head")
    assert {cut.dim for cut in cuts_of(gm, whole).inputs().values()} == {
        0,
        1,
    }  # each column has its own


def test_summands_of_few_bits():
    def scaled(kind):
        return lambda x, w, a, b: aten._scaled_mm(x, aten.t(w), a, b, None, None, kind)

    gm, _, module = made(scaled(torch.bfloat16), *EIGHT, ONE, ONE)
    assert len(cuts_of(gm, module).inputs()) == 1
    gm, _, module = made(scaled(FP8), *EIGHT, ONE, ONE)
    with pytest.raises(CutRefused, match="in which summands are not added"):
        cuts_of(gm, module)


def test_one_scale_of_all_rows_must_be_a_weight():
    """A scale of this rank's own rows is not that of other ranks'; one that is loaded is compared over the ranks."""

    def dynamic(x, w, b):
        return aten._scaled_mm(x.to(FP8), aten.t(w), x.abs().amax() / 448, b, None, None, torch.bfloat16)

    gm, node, module = made(dynamic, X, W.to(FP8), torch.ones(()))
    rows, _, by_weight = gm.graph.find_nodes(op="placeholder")
    assert read_beside(gm, module, cuts_of(gm, module).inputs()) == [by_weight.name, rows.name]
    assert len(product_of(node).single) == 2
    with gm.graph.inserting_before(node):
        constant = gm.graph.create_node("get_attr", "one")
    constant.meta["val"] = by_weight.meta["val"]
    node.replace_input_with(by_weight, constant)
    with pytest.raises(CutRefused, match="a constant of the graph, scales rows of other ranks"):
        read_beside(gm, module, cuts_of(gm, module).inputs())


def test_factors_of_blocks_and_of_single_elements():
    """Only one number for a row, a column or everything goes with a cut of rows or columns."""
    gm = make_fx(lambda m, x, w: aten.addmm(m, x, w), tracing_mode="fake")(torch.ones(ROWS, WIDTH), X, W)
    assert product_of(next(n for n in gm.graph.nodes if n.name == "addmm")) is None
    gm = make_fx(lambda m, x, w: aten.addmm(m, x, w), tracing_mode="fake")(torch.ones(WIDTH), X, W)
    node = next(n for n in gm.graph.nodes if n.name == "addmm")
    assert product_of(node) is not None
    blocks = gm.graph.find_nodes(op="placeholder")[0]
    blocks.meta["val"] = node.meta["val"].new_ones(2, WIDTH)
    assert product_of(node) is None


@pytest.mark.parametrize("repeated", [False, True])
def test_rows_of_one_product_with_every_row_of_the_other(repeated):
    def f(x, gate, up, down):
        inner = aten.mul(aten.unsqueeze(aten.silu(aten.mm(x, gate)), int(repeated)), aten.mm(x, up))
        return aten.mm(aten.reshape(inner, (-1, WIDTH)), down)

    gm = make_fx(f, tracing_mode="fake")(X, W, W + 1, W + 2)
    products = tuple(n.name for n in gm.graph.nodes if n.target is aten.mm.default)
    module = SharedModule("mlp", "module", products, group_of(2, 0), True)
    if repeated:  # [R, 1, I] times [R, I]
        with pytest.raises(CutRefused, match="repeats unsqueeze over rows or columns"):
            cuts_of(gm, module)
    else:
        assert [cut.dim for cut in cuts_of(gm, module).inputs().values()] == [0, 1, 1]


def test_memory_of_others_is_not_released():
    """A view of more memory, and a weight whose memory another input has, keep it; one of its own loses it."""
    memory, alone = torch.ones(8, WIDTH), torch.ones(4, WIDTH)
    shared, seen = torch.ones(4, WIDTH), torch.ones(0)
    values = {"view": memory[:4], "alone": alone, "twice": shared, "other": shared.detach(), "seen": seen}
    inputs = [GraphInput(name, value, "parameter") for name, value in values.items()]
    cut, axis = Cut(0, 1, 2), group_of(2, 0)
    sharing = Sharing(cuts=dict.fromkeys(("view", "alone", "twice"), cut))
    sharing.axes = dict.fromkeys(sharing.cuts, axis)
    places = {list(values).index(name): name for name in sharing.cuts}
    parts = _made(places, sharing, inputs, Options.parse({"release_weights": True}))
    assert [tuple(part.shape) for part in parts.values()] == [(2, WIDTH)] * 3
    assert [is_released(values[name]) for name in sharing.cuts] == [False, True, False]
    assert bool((memory == 1).all()) and bool((values["other"] == 1).all())
