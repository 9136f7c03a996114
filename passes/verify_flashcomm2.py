"""The proof of FlashComm 2: every rank has the rows and columns that it should, for every T, and nothing else changed.

Each sum over tp of the original is a statement about rows, columns and ranks (``verify_chunks``); a value of the
rewritten graph about which the same is true is that sum. All other calls must be the original's
(``verify_same_calls``). Shares no code with the pass. Rows of padding may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import is_wait
from cpcompile.passes.verify_arguments import Argument, Arguments, Refused, communicates, op_name
from cpcompile.passes.verify_chunks import OVER_TP, Moves, Value, alike
from cpcompile.passes.verify_gathered import GatheredWeights
from cpcompile.passes.verify_index import Shape, product, row_major, shape, tensor_shape
from cpcompile.passes.verify_proof import Failure, Proof
from cpcompile.passes.verify_same_calls import Copies, Original, check_shape

# Op -> its row operand, weight and bias: the products of which the proof knows that a row of the result is a row of the
# operand times the weight. Sources: native_functions.yaml, torch_npu's schemas.
ROW_PRODUCTS: Mapping[str, tuple[str, str, str]] = {
    "aten::mm": ("self", "mat2", ""),
    "aten::_int_mm": ("self", "mat2", ""),
    "aten::addmm": ("mat1", "mat2", "self"),
    "aten::_scaled_mm": ("self", "mat2", "bias"),
    "npu::npu_quant_matmul": ("x1", "x2", "bias"),
}
_ROW_SCALES = ("scale_a", "pertoken_scale")


def prove_flashcomm2(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    axes: tuple[Axis, Axis, Axis],
    recipes: Mapping[str, Any],
    same_on_ranks: Callable[[str], bool],
) -> Proof:
    """Prove that ``rewritten`` with inputs changed by ``recipes`` computes what ``original`` does.

    All ranks of tp run graphs that are alike but for the rows and vocabulary that each takes as its own.

    Args:
        original: functional ATen graph of one rank, ``meta["val"]`` set.
        rewritten: the graph that is to replace it.
        axes: this rank's tp, OTP and ODP.
        recipes: graph input → ``Gather`` or ``Sum``, or nothing where it stays.
        same_on_ranks: whether the graph input of that name is the same on every rank of tp.
    """
    return _Prover(original, rewritten, axes, recipes, same_on_ranks).run()


class _Prover:
    def __init__(
        self,
        original: fx.GraphModule,
        rewritten: fx.GraphModule,
        axes: tuple[Axis, Axis, Axis],
        recipes: Mapping[str, Any],
        same_on_ranks: Callable[[str], bool],
    ) -> None:
        self.moves, self.gm = Moves(*axes), rewritten
        self.original = Original(original, axes[0])
        self.copies = Copies(self.original, rewritten, axes[0])
        self.weights = GatheredWeights(self.original, self.copies, axes[2], recipes, same_on_ranks)
        self.values: dict[fx.Node, Value] = {}
        self.waiting: set[fx.Node] = set()
        self.replaced: set[int] = set()
        self.products: dict[tuple[int, int], list[fx.Node]] = {}
        self.sums: list[tuple[Value, fx.Node]] = self._sums()
        self.facts: dict[str, str] = {}

    def run(self) -> Proof:
        failures = [Failure(node, message) for node, message in self.weights.check_recipes()]
        if not self.moves.groups_fit:
            failures.append(Failure("placeholder", "expected OTP {i + jG} and ODP {jG ...} of tp; found other ranks"))
        for node in self.gm.graph.nodes:
            try:
                if node.op != "output" and not self.copies.arguments.visit_size(node, self._shape):
                    self._visit(node)
            except Refused as refused:
                failures.append(Failure(node.name, f"{node.name}: {refused}"))
        failures += [Failure(name, message) for name, message in self.copies.check_rest(self.replaced)]
        return Proof(not failures, tuple(failures), self.facts)

    def _sums(self) -> list[tuple[Value, fx.Node]]:
        """The original's sums over tp of products: what each says, and its wait."""
        found, values = [], dict[fx.Node, Value]()
        for node in self.original.gm.graph.nodes:
            form = ROW_PRODUCTS.get(op_name(node.target)) if node.op == "call_function" else None
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            if form is not None:
                args = self.original.arguments.arguments(node)
                key = (self.original.number(args[form[0]]), self.original.number(args[form[1]]))
                self.products.setdefault(key, []).append(node)
                sizes = tensor_shape(node.meta["val"])
                values[node] = Value(("sums", self.original.number(node)), sizes[1], row_major(sizes), (0, 0))
            elif source in values and node.op == "call_function":
                try:
                    moved = self.moves.moved(node, self.original.arguments.arguments(node), values[source])
                except Refused:
                    continue
                if moved is None or (moved.summed == OVER_TP and not is_wait(node) and not communicates(node)):
                    continue
                values[node] = moved
                if is_wait(node) and moved.summed == OVER_TP:
                    found.append((moved, node))
        return found

    def _shape(self, node: fx.Node) -> Shape:
        if node in self.values:
            return shape(self.values[node].dims)
        if node in self.copies.at:
            return shape(self.copies.at[node][1])
        raise Refused(f"the size of {node} is asked for, which was not proven")

    def _visit(self, node: fx.Node) -> None:
        if self.weights.visit(node) or any(not self._is_known(n) for n in node.all_input_nodes):
            return  # or the failure of an operand has been told
        waiting = next((n for n in node.all_input_nodes if n in self.waiting and not is_wait(node)), None)
        if waiting is not None:
            raise Refused(f"expected the wait_tensor of {waiting}; found {waiting} itself", 2)
        reason: Refused | None = None
        try:
            self.copies.copy(node)
        except Refused as refused:
            reason = refused
        try:
            value = self._value(node)
        except Refused as refused:
            value, reason = None, max((r for r in (reason, refused) if r), key=lambda r: r.specific)
        if value is not None:
            self._state(node, value)
        elif node not in self.copies.at:
            assert reason is not None
            moved = next((n for n in node.all_input_nodes if n in self.values and n not in self.copies.at), None)
            if moved is not None and reason.specific <= 1:
                found = self.moves.rows(self.values[moved])
                raise Refused(f"expected {moved} to be a sum of the original; found {found}")
            raise reason

    def _is_known(self, node: fx.Node) -> bool:
        known = (self.copies.at, self.copies.arguments.sizes, self.values, self.weights.at, self.weights.summed)
        return any(node in one for one in known)

    def _state(self, node: fx.Node, value: Value) -> None:
        check_shape(node, shape(value.dims))
        self.values[node] = value
        self.facts[node.name] = self.moves.rows(value)
        if communicates(node) and not is_wait(node):
            self.waiting.add(node)
            return
        wait = next((w for said, w in self.sums if alike(said, value)), None)
        if wait is not None and node not in self.copies.at:
            self.copies.take(node, self.original.at[wait])
            self.replaced |= {self.original.number(n) for n in (wait, *wait.all_input_nodes)}

    def _value(self, node: fx.Node) -> Value | None:
        arguments: Arguments = self.copies.arguments
        if node.op != "call_function":
            return None
        if op_name(node.target) in ROW_PRODUCTS:
            return self._product(node, arguments.arguments(node))
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        value = None if source is None else self.values.get(source) or self._own_rows(source)
        return None if value is None else self.moves.moved(node, arguments.arguments(node), value)

    def _own_rows(self, node: fx.Node) -> Value | None:
        """A copy of the rows operand of one of the original's products, on this rank."""
        number = self.copies.at[node][0] if node in self.copies.at else None
        if number is None or all(rows != number for rows, _ in self.products):
            return None
        sizes = shape(self.copies.at[node][1])
        return Value(("rows", number), sizes[-1], row_major(sizes), self.moves.own) if len(sizes) == 2 else None

    def _product(self, node: fx.Node, args: Mapping[str, Argument]) -> Value | None:
        rows, weight, bias = ROW_PRODUCTS[op_name(node.target)]
        value, found = self.values.get(args[rows]), self.weights.at.get(args[weight])
        if value is None or found is None:
            return None
        number, dim = found
        if dim != 0:
            raise Refused(f"expected the rows of ODP's weights one after another; found dim {dim}", 3)
        for old in self.products.get((value.of[1], number), ()):
            theirs = self.original.arguments.arguments(old)
            others = [n for n in theirs if n not in (rows, weight, bias)]
            if old.target is node.target and all(self._same_argument(n, args[n], theirs[n]) for n in others):
                if bias and not self.weights.is_sum(args[bias], theirs[bias]):
                    raise Refused(f"expected the sum of ODP's {theirs[bias]}; found {args[bias]}", 3)
                width, k = tensor_shape(old.meta["val"])[1], tensor_shape(theirs[rows].meta["val"])[1]
                return self.moves.multiplied(value, k, (self.original.number(old), width))
        raise Refused("expected the weight of its rows' own product; found another", 3)

    def _same_argument(self, name: str, mine: Argument, theirs: Argument) -> bool:
        """Whether a factor of a product is the original's, and the same on all ranks."""
        if not isinstance(theirs, fx.Node):
            return bool(mine == theirs)
        alike = isinstance(mine, fx.Node) and self.copies.at.get(mine) == self.original.at[theirs]
        single = name not in _ROW_SCALES or product(tensor_shape(theirs.meta["val"])) == 1
        return alike and single and self.weights.is_same(theirs)
