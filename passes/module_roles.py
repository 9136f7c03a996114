"""Which products of a graph are the o_proj, MLP and lm_head of the model, and which lookup is its embedding.

Found by dataflow: what reads token ids, what reads the result of attention, what goes up to an activation and comes
down again, and what leads to the graph's outputs with nothing but views on the way. Names decide only between several
candidates.
Refuses: experts and shared experts as MLPs, and what has several candidates that no name tells apart.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch._ops import OpOverload

from cpcompile.errors import OptionError, nearest, unexpected
from cpcompile.passes.base import Refusal
from cpcompile.passes.collectives import is_collective, is_wait, op_name
from cpcompile.passes.describe import module_of
from cpcompile.passes.products import Product, product_of
from cpcompile.passes.vllm_ops import inner_op

ROLES = ("embedding", "o_proj", "mlp", "lm_head")
NONE = "none"

VIEWS = frozenset(
    f"aten::{n}" for n in ("view", "_unsafe_view", "reshape", "permute", "t", "transpose", "unsqueeze", "squeeze")
) | frozenset(f"aten::{n}" for n in ("clone", "contiguous", "alias", "detach", "_to_copy", "expand", "slice"))
MOVES = VIEWS | {"aten::constant_pad_nd", "aten::cat", "aten::split_with_sizes", "aten::split"}
SOFTMAX = frozenset({"aten::_softmax", "aten::_safe_softmax", "aten::softmax"})
SPLITS = frozenset({"aten::split", "aten::split_with_sizes"})
# Ops on the two halves of a dim, with the argument that names it.
HALVING: Mapping[str, str] = {"npu::npu_swiglu": "dim"}
ACTIVATIONS = frozenset(HALVING) | frozenset(
    f"aten::{n}"
    for n in ("silu", "gelu", "sigmoid", "relu", "tanh", "erf", "mish", "elu", "leaky_relu", "hardtanh", "hardswish")
)
_QUANTISING = frozenset(
    {"getitem", "aten::amax", "aten::round", "aten::clamp", "aten::div", "aten::mul", "npu::npu_dynamic_quant"}
)
_NAMES = {"embedding": "embed_tokens", "lm_head": "lm_head"}


@dataclass(frozen=True)
class Module:
    """One module that may be tensor-parallel over a group of its own.

    Args:
        role: one of ``ROLES``.
        name: the model's name of it, or the node's where the trace has none.
        nodes: the lookup, the product, or an MLP's products with the one that comes down last.
    """

    role: str
    name: str
    nodes: tuple[fx.Node, ...]


def find_modules(
    gm: fx.GraphModule, wanted: Collection[str], overrides: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Module], list[Refusal]]:
    """The modules of the roles ``wanted`` in graph order, and what was not taken for one, with reasons.

    Args:
        gm: functional ATen graph.
        wanted: some of ``ROLES``.
        overrides: role → fnmatch patterns of names of the modules that have it, no others; ``"none"``: none has.

    Raises:
        OptionError: a pattern matches no module that could have the role.
    """
    refused: list[Refusal] = []
    found: list[Module] = []
    graph = _Graph(gm)
    finders: dict[str, Callable[[], Iterable[Module | Refusal]]] = {
        "embedding": graph.embeddings, "o_proj": graph.output_projections, "mlp": graph.mlps, "lm_head": graph.heads,
    }  # fmt: skip
    given = dict(overrides or {})
    excluded = given.pop(NONE, ())
    for role in ROLES:
        if role not in wanted:
            continue
        try:
            every = list(finders[role]())
        except Exception as error:  # a bug of ours must not take the other roles
            refused.append(Refusal(role, unexpected(error, f"finding the {role}")))
            continue
        refused += [c for c in every if isinstance(c, Refusal)]
        candidates = [c for c in every if isinstance(c, Module)]
        patterns = given.get(role)
        named = graph.named(role, patterns) if patterns else _told_apart(role, candidates, refused)
        found += [m for m in named if not any(fnmatch.fnmatchcase(m.name, p) for p in excluded)]
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    return sorted(found, key=lambda m: order[m.nodes[0]]), refused


def _told_apart(role: str, candidates: list[Module], refused: list[Refusal]) -> list[Module]:
    """A model has one embedding and one lm_head: of several, the one with the usual name."""
    if role not in _NAMES or len(candidates) <= 1:
        return candidates
    usual = [c for c in candidates if c.name.endswith(_NAMES[role])]
    if len(usual) == 1:
        return usual
    names = ", ".join(c.name for c in candidates)
    refused.append(Refusal(candidates[0].nodes[0].name, f"{role} may be any of {names}: say which with modules="))
    return []


class _Graph:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.nodes = list(gm.graph.nodes)
        self.products = {n: p for n in self.nodes if (p := product_of(n)) is not None and is_weight(p.weight)}
        self.attention = self._behind_attention()

    def embeddings(self) -> Iterable[Module]:
        for node in self.nodes:
            if op_name(node.target) == "aten::embedding" and is_weight(node.args[0]):
                yield Module("embedding", _name(node), (node,))

    def output_projections(self) -> Iterable[Module]:
        for node, product in self.products.items():
            if product in self.attention:
                yield Module("o_proj", _name(node), (node,))

    def mlps(self) -> Iterable[Module | Refusal]:
        for down, product in self.products.items():
            if product in self.attention:
                continue
            first = self._activated(product)
            if not first:
                continue
            reader = self._other_reader(first)
            if reader is None:
                yield Module("mlp", _parent(down), (*first, down))
            else:
                yield Refusal(down.name, f"its input is also read by {reader}: a shared expert, which is no dense mlp")

    def heads(self) -> Iterable[Module]:
        taken = {n for m in self.mlps() if isinstance(m, Module) for n in m.nodes}
        for node, product in self.products.items():
            if node not in taken and product not in self.attention and _only_output(node):
                yield Module("lm_head", _name(node), (node,))

    def named(self, role: str, patterns: Sequence[str]) -> list[Module]:
        """The modules whose names match, in the form that ``role`` has."""
        forms: dict[str, Iterable[Module | Refusal]] = {
            "embedding": self.embeddings(),
            "mlp": [m for p in self.products.values() if (m := self._mlp(p)) is not None],
        }
        plain = [Module(role, _name(n), (n,)) for n in self.products]
        known = [m for m in forms.get(role, plain) if isinstance(m, Module)]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(m.name, pattern) for m in known):
                names = nearest(pattern, {m.name for m in known})
                raise OptionError(f"modules: no module called {pattern!r} has the form of {role}{names}")
        return [m for m in known if any(fnmatch.fnmatchcase(m.name, p) for p in patterns)]

    def _mlp(self, down: Product) -> Module | None:
        first = self._activated(down)
        return (
            Module("mlp", _name(down.node).rpartition(".")[0] or down.node.name, (*first, down.node)) if first else None
        )

    def _behind_attention(self) -> set[Product]:
        """The products that read what attention found before any other product has."""
        fresh, read, found = set[fx.Node](), set[fx.Node](), set[Product]()
        for node in self.nodes:
            product = self.products.get(node)
            if is_attention(node):
                fresh.add(node)
            elif product is not None and product.rows in fresh:
                found.add(product)
                read.add(node)
            elif any(n in read for n in node.all_input_nodes):
                read.add(node)
            elif product is None and any(n in fresh for n in node.all_input_nodes):
                fresh.add(node)
        return found

    def _activated(self, down: Product) -> tuple[fx.Node, ...]:
        """The products that an activation and nothing but elementwise ops lie between and ``down``; none if not so."""
        middle = between(down.rows, self.products)
        if middle is None or not any(op_name(n.target) in ACTIVATIONS for n in middle):
            return ()
        first = {n for m in middle for n in m.all_input_nodes if n in self.products}
        ordered = tuple(n for n in self.products if n in first)
        roots = {source_of(self.products[n].rows) for n in ordered}
        closed = all(user in middle or user is down.node for n in (*ordered, *middle) for user in n.users)
        return ordered if len(roots) == 1 and closed else ()

    def _other_reader(self, first: Sequence[fx.Node]) -> str | None:
        """What reads the input of the products ``first`` beside them: a router, experts, or another product."""
        pending, seen = [_unquantised(source_of(self.products[first[0]].rows))], set[fx.Node]()
        while pending:
            node = pending.pop()
            for user in node.users:
                name = op_name(user.target)
                if user in seen or user in first or user.op != "call_function":
                    continue
                seen.add(user)
                if (
                    name in MOVES | _QUANTISING
                    or is_wait(user)
                    or is_collective(user)
                    or name in ("getitem", "aten::amax")
                ):
                    pending.append(user)
                elif name not in ("aten::add", "aten::abs", "aten::sym_size"):
                    return _name(user)
        return None


def between(last: fx.Node, products: Collection[fx.Node]) -> list[fx.Node] | None:
    """The views and elementwise ops that lead from ``products`` to ``last``; None where anything else does."""
    found: list[fx.Node] = []
    pending = [last]
    while pending:
        node = pending.pop()
        if node in found or node in products or not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            continue
        known = op_name(node.target) in VIEWS | SPLITS | HALVING.keys() | {"getitem"} or is_elementwise(node)
        if node.op != "call_function" or not known:
            return None
        found.append(node)
        pending += node.all_input_nodes
    return found


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element of the result is a function of the same element of the operands, after broadcasting."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims") or target._schema.is_mutable:
        return False
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    return op_name(target) == "aten::_to_copy" or (torch.Tag.pointwise in target.tags and not drawn)


def is_weight(node: object) -> bool:
    """Whether ``node`` is computed from the graph's inputs by views, casts and scaling alone, and is no activation.

    The pass that cuts it finds out whether the inputs are parameters.
    """
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node.target) not in VIEWS | {"aten::mul"} or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    value = node.meta.get("val") if isinstance(node, fx.Node) and node.op == "placeholder" else None
    return isinstance(value, torch.Tensor) and not any(isinstance(size, torch.SymInt) for size in value.shape)


def is_attention(node: fx.Node) -> bool:
    """Whether ``node`` weighs values by attention: an op that says so, or a product with the result of a softmax."""
    name = op_name(inner_op(node))
    if "attention" in name and "indexer" not in name:
        return True
    return name in ("aten::bmm", "aten::matmul") and any(
        op_name(source_of(n).target) in SOFTMAX for n in node.all_input_nodes
    )


def source_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view or copy of."""
    while node.op == "call_function" and op_name(node.target) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _unquantised(node: fx.Node) -> fx.Node:
    """The value that ``node`` is the quantised form of, itself if it is none."""
    value = node.meta.get("val")
    narrow = isinstance(value, torch.Tensor) and value.dtype.itemsize == 1
    while narrow and op_name(node.target) in _QUANTISING | VIEWS:
        node = node.all_input_nodes[0]
    return node


def _only_output(node: fx.Node) -> bool:
    """Whether ``node`` leads to the graph's outputs, and to nothing else, by views, casts and moves."""
    pending, reached = [node], False
    while pending:
        for user in pending.pop().users:
            name = op_name(user.target)
            if user.op == "output":
                reached = True
            elif name in MOVES or is_wait(user) or is_collective(user) or name == "getitem":
                pending.append(user)
            elif name != "aten::sym_size":
                return False
    return reached


def _parent(node: fx.Node) -> str:
    return _name(node).rpartition(".")[0] or node.name


def _name(node: fx.Node) -> str:
    return module_of(node) or node.name
