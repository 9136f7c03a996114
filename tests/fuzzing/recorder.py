"""A functional ATen graph from a Python function on fake tensors, in a few milliseconds.

What dynamo and AOTAutograd would make of a module, for programs that need nothing else of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Input:
    """One input of a graph.

    Args:
        name: of the placeholder.
        shape: sizes; a letter is a symbolic one. None for an int, which is symbolic.
        dtype: of a tensor.
    """

    name: str
    shape: tuple[int | str, ...] | None
    dtype: torch.dtype = torch.float64


@dataclass
class Recorder(TorchDispatchMode):
    """Notes every op in ``graph``; ``nodes`` finds the node of a tensor by its id, ``sizes`` that of an expression."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    sizes: dict[sympy.Expr, fx.Node] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # an id is a tensor's only as long as that lives

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def note(self, node: fx.Node, value: Any) -> fx.Node:
        """``value`` is what ``node`` gives."""
        node.meta["val"] = value
        self.kept.append(value)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
        elif isinstance(value, torch.SymInt):
            self.sizes.setdefault(value.node.expr, node)
        return node

    def argument(self, value: Any) -> Any:
        """What stands for ``value`` among a node's arguments."""
        if isinstance(value, Tensor):
            return self.nodes[id(value)]
        return self._size(value.node.expr) if isinstance(value, torch.SymInt) else value

    def _size(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr not in self.sizes:
            assert isinstance(expr, (sympy.Add, sympy.Mul)), f"size {expr}"
            parts = tuple(self._size(part) for part in expr.as_two_terms())
            target = operator.add if expr.is_Add else operator.mul
            values = [p.meta["val"] if isinstance(p, fx.Node) else p for p in parts]
            self.note(self.graph.call_function(target, parts), target(*values))
        return self.sizes[expr]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return result
        assert not func._schema.is_mutable, f"{func} writes: functionalise the program"
        node = self.graph.call_function(func, *tree_map(self.argument, (tuple(args), dict(kwargs or {}))))
        self.note(node, result)
        if not isinstance(result, Tensor):
            for index, part in enumerate(result):
                self.note(self.graph.call_function(operator.getitem, (node, index)), part)
        return result


def record(program: Callable[..., Any], inputs: Sequence[Input], sizes: Mapping[str, int]) -> fx.GraphModule:
    """``program(recorder, values by name)`` as a graph.

    Args:
        program: returns a list of tensors.
        inputs: the graph's inputs after its sizes, each of which is an input too.
        sizes: letter of each symbolic size, and an example of it.
    """
    env = ShapeEnv()
    mode, recorder = FakeTensorMode(shape_env=env), Recorder()
    values: dict[str, Any] = {}
    for letter, example in sizes.items():
        context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
        values[letter] = mode.from_tensor(
            torch.empty(example), symbolic_context=context, source=ConstantSource(letter)
        ).shape[0]
    with mode:
        for given in inputs:
            if given.shape is None:
                source = ConstantSource(given.name)
                values[given.name] = env.create_unspecified_symint_and_symbol(5, source, DimDynamic.DYNAMIC)
            else:
                shape = [values[s] if isinstance(s, str) else s for s in given.shape]
                values[given.name] = torch.zeros(shape, dtype=given.dtype)
    for name, value in values.items():
        recorder.note(recorder.graph.placeholder(name), value)
    run = torch.func.functionalize(program)  # type: ignore[attr-defined]
    # As AOTAutograd traces: C++ kernels that take an op apart cannot ask for symbolic sizes before torch 2.12.
    with torch.no_grad(), enable_python_dispatcher(), mode, recorder:
        outputs = run(recorder, values)
        recorder.graph.output(tuple(recorder.argument(v) for v in outputs))
    return fx.GraphModule({}, recorder.graph)
