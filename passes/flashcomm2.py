"""FlashComm 2: the product behind tensor-parallel attention runs on 1/G of the rows with G times the columns.

Before: ``[T, HD/tp] x [HD/tp, H]`` on every rank, the summands reduce-scattered along rows, or all-reduced, over tp.
After (G = tp/otp; rank r = i + jG): rows padded to tp chunks of them, chunks ordered ``[i + jG]``, all-to-all over
ODP(j) (ranks jG to jG + G-1), ``[T/G, HD/otp] x [HD/otp, H]``, reduce-scatter over OTP(i) (ranks i, i + G, ...; none
for otp = 1), and an all-gather over tp where the graph had an all-reduce. Rank r holds row chunk r, as a reduce-scatter
over tp leaves it. The weight is asked for as ``Gather`` over ODP, a bias that is added before the sum as ``Sum`` over
ODP; rows of padding hold that bias where they held zero.
Source: vllm-ascend, FlashComm 2.
Refuses: what ``flash_sites`` finds no site for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx
from torch.utils._sympy.functions import FloorDiv

from cpcompile.passes.base import Refusal
from cpcompile.passes.collectives import NATIVE, arguments, fake_value, is_contiguous, op_name
from cpcompile.passes.flash_sites import FlashGroups, Site, find_sites
from cpcompile.passes.graph_emitter import GraphEmitter
from cpcompile.passes.materialise import fake_mode_of
from cpcompile.passes.products import PRODUCTS
from cpcompile.passes.row_moves import RowMoves
from cpcompile.passes.token_layout import Expr, product, shape_of, size_expr
from cpcompile.passes.weight_recipes import Gather, Sum

aten = torch.ops.aten


@dataclass(frozen=True)
class FlashGraph:
    """A graph with FlashComm 2.

    Args:
        gm: the graph.
        recipes: graph input → what becomes of it; inputs that are not here stay as they are.
        products: name of a product in the old graph → its name in the new one, for each that was rewritten.
        refused: the products that were left alone, with reasons.
    """

    gm: fx.GraphModule
    recipes: Mapping[str, Gather | Sum]
    products: Mapping[str, str]
    refused: tuple[Refusal, ...]


def use_flashcomm2(
    gm: fx.GraphModule,
    products: Sequence[str],
    groups: FlashGroups,
    same: Collection[str] = (),
    hints: Mapping[sympy.Symbol, int] | None = None,
) -> FlashGraph:
    """Return a new graph in which ``products`` run as FlashComm 2 runs them; ``gm`` is left as it is.

    Args:
        gm: functional ATen graph; all-reduces canonical.
        products: names of the products of o_proj (``module_roles.find_modules``).
        groups: the ranks.
        same: names of nodes that are known to be the same on all ranks of tp: scales need to be.
        hints: sizes of the traced example.
    """
    sites, refused = find_sites(gm, products, groups, same)
    return _Builder(gm, sites, groups, hints or {}).run(refused)


class _Builder:
    """Builds the new graph; ``env`` holds the copy of every node."""

    def __init__(
        self, gm: fx.GraphModule, sites: Sequence[Site], groups: FlashGroups, hints: Mapping[sympy.Symbol, int]
    ) -> None:
        self.gm, self.groups, self.new = gm, groups, fx.Graph()
        self.tp, self.otp, self.odp = (sympy.Integer(a.size) for a in (groups.tp, groups.otp, groups.odp))
        self.emitter = GraphEmitter(self.new, fake_mode_of(gm), hints)
        self.env: dict[fx.Node, fx.Node] = {}
        self.starts = {site.start: site for site in sites}
        self.gone = {n for s in sites for n in (s.p.node, *s.moves, s.wait)}
        self.wider = {n: cut.dim for s in sites for n, cut in s.cuts.nodes.items()}
        self.biases = [s.p.bias for s in sites if s.p.bias is not None]
        self.products: dict[str, str] = {}

    def run(self, refused: tuple[Refusal, ...]) -> FlashGraph:
        for node in self.gm.graph.nodes:
            self.emitter.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
            if node in self.starts:
                self.env[self.starts[node].wait] = self._rewritten(self.starts[node])
            elif node not in self.gone:
                self._copy(node)
        self.new.eliminate_dead_code()
        self.new.lint()
        built = fx.GraphModule(self.gm, self.new)
        built.meta.update(self.gm.meta)
        odp = self.groups.odp
        recipes: dict[str, Gather | Sum] = {
            n.name: Gather(dim, odp.size, odp) for n, dim in self.wider.items() if n.op == "placeholder"
        }
        recipes |= {n.name: Sum(odp) for n in self.biases}
        return FlashGraph(built, recipes, self.products, refused)

    def _copy(self, node: fx.Node) -> None:
        copy = self.new.node_copy(node, self.env.__getitem__)
        copy.meta = dict(node.meta)
        if node in self.wider and node.op == "placeholder":
            value, dim = node.meta["val"], self.wider[node]
            shape = tuple(s * self.odp if d == dim else s for d, s in enumerate(shape_of(value)))
            copy.meta["val"] = self.emitter.fake(shape, value)
        elif node in self.wider:
            copy.meta["val"] = fake_value(copy, copy)
        if node.op == "placeholder":
            self.emitter.bind(copy)
        self.env[node] = copy

    def _rewritten(self, site: Site) -> fx.Node:
        """This rank's chunk of the summed rows, or all rows, in the place of the wait of ``site``."""
        self.emitter.meta = {
            k: site.p.node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in site.p.node.meta
        }
        like, target = site.p.node.meta["val"], shape_of(site.wait.meta["val"])
        height, width = (size_expr(s) for s in like.shape)
        rows, chunk = self._chunked(site, height)
        rows = self._exchanged(rows, site.p.rows.meta["val"], chunk)
        summed = self._product(site, rows, chunk * self.otp)
        if self.groups.otp.size > 1:
            args = (summed, "sum", self.groups.otp.size, self.groups.otp.group_name)
            summed = self._collective(NATIVE.reduce_scatter_tensor, args, like, (chunk, width))
        if site.scatters:
            return self.emitter.reshape(summed, like, (chunk, width), target)
        padded, tp = chunk * self.tp, self.groups.tp
        whole = self._collective(NATIVE.all_gather_into_tensor, (summed, tp.size, tp.group_name), like, (padded, width))
        if padded != height:
            whole = self.emitter.call(
                aten.slice.Tensor, (whole, 0, 0, self.emitter.size(height)), like, (height, width)
            )
        return self.emitter.reshape(whole, like, (height, width), target)

    def _chunked(self, site: Site, height: Expr) -> tuple[fx.Node, Expr]:
        """Rows of the product as tp chunks one after another, ``[tp*M, K]``, and M."""
        value, rows = site.p.rows.meta["val"], self.env[site.p.rows]
        width = size_expr(value.shape[1])
        if not is_contiguous(site.p.rows):
            rows = self.emitter.contiguous(rows, value, (height, width))
        if site.scatters:
            moves = RowMoves(self.emitter, self.env, value, width)
            rows, shape = moves.replay(site.moves, rows, (height, width))
            chunk = product(shape_of(site.wait.meta["val"])[:-1])
            return self.emitter.reshape(rows, value, shape, (chunk * self.tp, width)), chunk
        chunk = FloorDiv(height + self.tp - 1, self.tp)
        if chunk * self.tp != height:
            pad = [0, 0, 0, self.emitter.size(chunk * self.tp - height)]
            rows = self.emitter.call(aten.constant_pad_nd.default, (rows, pad, 0), value, (chunk * self.tp, width))
        return rows, chunk

    def _exchanged(self, rows: fx.Node, like: torch.Tensor, chunk: Expr) -> fx.Node:
        """This rank's columns of all chunks, ``[tp*M, K]``, as ODP's columns of the chunks of OTP, ``[otp*M, G*K]``."""
        tp, otp, odp, width = self.tp, self.otp, self.odp, size_expr(like.shape[1])
        part = otp * chunk
        rows = self._swapped(rows, like, (tp * chunk, width), (otp, odp, chunk, width))
        rows = self.emitter.reshape(rows, like, (odp, otp, chunk, width), (tp * chunk, width))
        splits = [self.emitter.size(part)] * self.groups.odp.size
        args = (rows, splits, splits, self.groups.odp.group_name)
        rows = self._collective(NATIVE.all_to_all_single, args, like, (tp * chunk, width))
        rows = self._swapped(rows, like, (tp * chunk, width), (odp, part, width))
        return self.emitter.reshape(rows, like, (part, odp, width), (part, odp * width))

    def _swapped(self, node: fx.Node, like: torch.Tensor, old: tuple[Expr, ...], shape: tuple[Expr, ...]) -> fx.Node:
        """A row-major ``node`` of shape ``old`` as ``shape`` with the first two dims exchanged, in memory too."""
        a, b, *rest = shape
        if a == 1:
            return self.emitter.reshape(node, like, old, (b, a, *rest))
        node = self.emitter.reshape(node, like, old, shape)
        order = [1, 0, *range(2, len(shape))]
        node = self.emitter.call(aten.permute.default, (node, order), like, (b, a, *rest))
        return self.emitter.contiguous(node, like, (b, a, *rest))

    def _product(self, site: Site, rows: fx.Node, height: Expr) -> fx.Node:
        """The product of ``site`` with its rows replaced."""
        form, node = PRODUCTS[op_name(site.p.node.target)], site.p.node
        assert isinstance(node.target, torch._ops.OpOverload)
        given = {**fx.node.map_arg(arguments(node), self.env.get), form.rows: rows}
        named = {a.name for a in node.target._schema.arguments if a.kwarg_only}
        args = tuple(v for k, v in given.items() if k not in named)
        like = node.meta["val"]
        new = self.emitter.call(
            node.target,
            args,
            like,
            (height, size_expr(like.shape[1])),
            None,
            **{k: given[k] for k in given if k in named},
        )
        self.products[node.name] = new.name
        return new

    def _collective(
        self, packet: torch._ops.OpOverloadPacket, args: tuple[object, ...], like: torch.Tensor, shape: tuple[Expr, ...]
    ) -> fx.Node:
        started = self.emitter.call(packet.default, args, like, shape)
        return self.emitter.call(NATIVE.wait_tensor.default, (started,), like, shape)
