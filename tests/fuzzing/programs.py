"""Random small modules of token-parallel kinds, as graphs of every rank: one structure, each rank's own constants."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from fuzzing.recorder import Input, Recorder, record
from fuzzing.worlds import AXIS, World, random_world

HIDDEN, VOCAB = 4, 24
C10D = torch.ops._c10d_functional
MARK = 7919  # constants from here on stand for each rank's own
FORMS = {
    # form: dims of the token ids, dims of the hidden state
    "T": (("T",), "T"),
    "BT": (("B", "T"), "BT"),
    "2T": ((2, "T"), "BT"),
    "1T": ((1, "T"), "BT"),
    "TB": (("B", "T"), "TB"),
    "T2": ((2, "T"), "TB"),
    "B5": (("B", 5), "BT"),
    "5": ((5,), "T"),
    "26": ((2, 6), "BT"),
}


@dataclass(frozen=True)
class Switches:
    """Kinds of input that a program may have.

    Args:
        reductions: all-reduces other than sums.
        groups: groups besides the axis.
        rank_ints: integers that differ by rank.
        rank_constants: constants that differ by rank.
        writes: in-place operations.
        default_axes: whether the axes may be found from the graph.
    """

    reductions: bool = True
    groups: bool = True
    rank_ints: bool = True
    rank_constants: bool = True
    writes: bool = True
    default_axes: bool = True


ALL = Switches()


@dataclass
class Value:
    """A tensor of the program: ``dims`` are letters of its row dims, then ``H`` for its features; ``TH`` or ``HT``."""

    tensor: Tensor
    dims: str

    @property
    def token(self) -> int:
        """Its token dim."""
        return self.dims.index("T")

    @property
    def feature(self) -> int:
        """Its feature dim."""
        return self.dims.index("H")


@dataclass
class Maker:
    """What a step works on.

    ``values`` are what has been made so far, the last of them the main stream.
    """

    rng: random.Random
    world: World
    switches: Switches
    recorder: Recorder
    inputs: dict[str, Any]
    values: list[Value] = field(default_factory=list)
    constants: list[tuple[float, ...]] = field(default_factory=list)
    used: int = 0

    @property
    def last(self) -> Value:
        """The main stream."""
        return self.values[-1]

    def push(self, tensor: Tensor, dims: str | None = None) -> None:
        """Make ``tensor`` the main stream, at a moderate size."""
        self.values.append(Value(tensor, self.last.dims if dims is None else dims))

    def pick(self) -> Value:
        """An earlier value of the main stream's shape, or the main stream."""
        return self.rng.choice([v for v in self.values if self._alike(v)])

    def _alike(self, other: Value) -> bool:
        return other.dims == self.last.dims and len(other.tensor.shape) == len(self.last.tensor.shape)

    def shared(self) -> Tensor:
        """A weight ``[H, H]`` that all ranks have."""
        return self.inputs[self.rng.choice(("shared_0", "shared_1"))]  # type: ignore[no-any-return]

    def own(self) -> Tensor:
        """A weight ``[H, H]`` of each rank's own."""
        return self.inputs[self.rng.choice(("own_0", "own_1", "own_2"))]  # type: ignore[no-any-return]

    def group(self) -> str:
        """The axis, mostly, or another group."""
        others = [name for name in self.world.groups if name != AXIS]
        return self.rng.choice([AXIS, *others]) if others and self.rng.random() < 0.6 else AXIS

    def rank_constant(self) -> int:
        """An integer of each rank's own, 1 to 8."""
        if not self.switches.rank_constants:
            return self.rng.randint(1, 4)
        shift = self.rng.randrange(3)
        self.constants.append(tuple(float(rank + 1 + shift) for rank in range(self.world.size)))
        return MARK + len(self.constants) - 1

    def all_reduce(self, x: Tensor, reduce_op: str = "sum", group: str = AXIS) -> Tensor:
        """The waited all-reduce. PyTorch's fake kernel keeps strides, its real one gives row-major memory."""
        return C10D.wait_tensor(C10D.all_reduce(x.contiguous(), reduce_op, group))  # type: ignore[no-any-return]


Step = Callable[[Maker], None]


@dataclass(frozen=True)
class Sample:
    """A random module on every rank of a world.

    Args:
        seed: makes it again, with ``steps`` and the switches.
        steps: how many steps it has.
        world: its ranks.
        form: how tokens lie, a key of ``FORMS``.
        graphs: each rank's graph.
        inputs: what the graph's inputs are.
        names: the steps that it was made of.
        default_axes: the axes are to be found from the graph.
    """

    seed: int
    steps: int
    world: World
    form: str
    graphs: Sequence[fx.GraphModule]
    inputs: Sequence[Input]
    names: Sequence[str]
    default_axes: bool


def sample(seed: int, switches: Switches = ALL, most: int = 9) -> Sample:
    """The module of ``seed``, of at most ``most`` steps after its first."""
    from fuzzing.steps import STEPS, begin

    rng = random.Random(seed)
    world = random_world(rng, switches.groups)
    form = rng.choices(tuple(FORMS), (36, 10, 10, 8, 8, 8, 6, 7, 7))[0]
    default_axes = switches.default_axes and rng.random() < 0.4
    writes = switches.writes and rng.random() < 0.2
    ids, dims = FORMS[form]
    rows = ids if dims != "TB" else ids[::-1]
    inputs = _inputs(ids, rows, switches, rng)
    chosen = rng.choices([step for step, _ in STEPS], [weight for _, weight in STEPS], k=rng.randint(1, 9))[:most]
    chosen = [s for s in chosen if writes or not getattr(s, "writes", False)]
    order = rng.random()
    made: list[Maker] = []

    def program(recorder: Recorder, values: dict[str, Any]) -> list[Tensor]:
        maker = Maker(random.Random(order), world, switches, recorder, values)
        begin(maker, dims)
        for step in chosen:
            step(maker)
        made[:] = [maker]
        return outputs(maker)

    letters = {str(d): {"T": 13, "B": 3}[str(d)] for d in ids if isinstance(d, str)}
    gm = record(program, inputs, dict(sorted(letters.items())))
    _prune(gm)
    kept = {n.target for n in gm.graph.find_nodes(op="placeholder")}
    graphs = [of_rank(gm, made[0].constants, rank) for rank in range(world.size)]
    names = [s.__name__ for s in chosen]
    return Sample(seed, len(chosen), world, form, graphs, [i for i in inputs if i.name in kept], names, default_axes)


def outputs(maker: Maker) -> list[Tensor]:
    """The main stream, and sometimes others, in any order."""
    rng = maker.rng
    found = [maker.last.tensor]
    for value in rng.sample(maker.values[:-1], min(len(maker.values) - 1, rng.choice((0, 0, 1, 1, 2)))):
        found.insert(rng.randint(0, len(found)), value.tensor)
    return found + found[:1] if rng.random() < 0.05 else found


def _inputs(ids: tuple[Any, ...], rows: tuple[Any, ...], switches: Switches, rng: random.Random) -> list[Input]:
    square = (HIDDEN, HIDDEN)
    found = [Input("ids", ids, torch.int64), Input("table", (VOCAB, HIDDEN))]
    found += [Input(f"shared_{i}", square) for i in range(2)] + [Input(f"own_{i}", square) for i in range(3)]
    found += [Input("gain", (HIDDEN,)), Input("own_gain", (HIDDEN,)), Input("own_rows", (*rows, HIDDEN))]
    found += [Input("own_table", (VOCAB, HIDDEN)), Input("order", (ids[-1],), torch.int64)]
    if switches.rank_ints:
        found.append(Input("own_int", None))
    rng.shuffle(found)
    return found


def _prune(gm: fx.GraphModule) -> None:
    """Take out what nothing uses, as AOTAutograd does; collectives that nothing uses stay."""
    for node in reversed(gm.graph.nodes):
        if node.users or node.op == "output":
            continue
        if node.op == "placeholder" or getattr(node.target, "namespace", "") != "_c10d_functional":
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def of_rank(gm: fx.GraphModule, constants: Sequence[tuple[float, ...]], rank: int) -> fx.GraphModule:
    """The graph with the constants of ``rank``; fake tensors are those of ``gm``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))

    def own(value: Any) -> Any:
        if isinstance(value, (int, float)) and MARK <= value < MARK + len(constants):
            return type(value)(constants[int(value) - MARK][rank])
        return value

    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), own)  # type: ignore[assignment]
    return fx.GraphModule(gm, graph)
