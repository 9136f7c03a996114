"""A GE graph on disk, and what is in it: op counts, collectives with their groups, bytes, inputs and outputs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.fx as fx
from torch._ops import OpOverload

from cpcompile.lowering.ascend.conversion import Converted
from cpcompile.passes.collectives import arguments, bound, is_collective
from cpcompile.passes.describe import module_of
from cpcompile.passes.token_layout import product, size_expr

TEXT, MODEL, OPTIONS, SUMMARY = "dynamo.pbtxt", "model.pb", "options.json", "summary.json"


@dataclass(frozen=True)
class GeSummary:
    """What a GE graph holds.

    Args:
        ops: how many ops of each type.
        collectives: a row for each: ``op``, its ``group`` and the ``ranks`` of that, what it ``sends`` as an expression
            in the graph's sizes, in bytes, and the ``module`` that it comes from.
        inputs: a row for each input of the GE graph, in order: its ``name`` there, its number ``of`` the traced graph's
            inputs, ``dtype`` and ``shape``; and what the exporter was told of that one, such as its ``source``, the
            model's name for it. Of sizes that are packed in one input, ``of`` and ``source`` are lists.
        outputs: a row for each output of the traced graph: its number ``of`` the GE graph's outputs, or what it is.
        bytes: length of the serialised graph.
        unsupported: ops without a converter: ``node``, ``op``, ``module``, ``reason``.
    """

    ops: Mapping[str, int]
    collectives: Sequence[Mapping[str, Any]]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Any]
    bytes: int
    unsupported: Sequence[Mapping[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def summarise(gm: fx.GraphModule, converted: Converted, known: Sequence[Mapping[str, Any]] = ()) -> GeSummary:
    """Summarise the GE graph that ``gm`` became; ``known`` has more to say of each input of ``gm``."""
    concrete = converted.concrete
    graph = concrete.graph
    return GeSummary(
        dict(sorted(Counter(op.type for op in graph.op).items(), key=lambda item: (-item[1], item[0]))),
        _collectives(gm, graph),
        _inputs(gm, converted, known),
        _outputs(converted),
        len(graph.SerializeToString()),
        [vars(u) for u in converted.unsupported],
    )


def write(folder: Path, gm: fx.GraphModule, converted: Converted, known: Sequence[Mapping[str, Any]] = ()) -> GeSummary:
    """Write the graph as text and serialised, the options for GE, and the summary, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    concrete = converted.concrete
    concrete.dump(str(folder / TEXT))
    (folder / MODEL).write_bytes(concrete.graph.SerializeToString())
    _write_options(folder, *concrete._normalize_ge_option())
    summary = summarise(gm, converted, known)
    (folder / SUMMARY).write_text(json.dumps(summary.to_dict(), indent=1) + "\n", encoding="utf-8")
    return summary


def _write_options(folder: Path, of_graph: Mapping[str, Any], of_all: Mapping[str, Any]) -> None:
    from torchair._ge_concrete_graph import fx2ge_converter

    writer = getattr(fx2ge_converter, "_generate_export_options_config", None)
    if writer is not None:
        writer(of_graph, of_all, str(folder))
        return
    # Releases before 2.13 have none, and no list of which options GE takes at compile or at execution time.
    options = {"compile options": {"global": dict(of_all), "session": dict(of_all), "graph": dict(of_graph)}}
    (folder / OPTIONS).write_text(json.dumps(options, indent=4) + "\n", encoding="utf-8")


def _collectives(gm: fx.GraphModule, graph: Any) -> list[dict[str, Any]]:
    """Torchair converts collectives one to one and in order."""
    ops = [op for op in graph.op if op.type.startswith("Hcom") or "group" in op.attr or "group_ep" in op.attr]
    nodes = [node for node in gm.graph.nodes if is_collective(node) or _fused(node)]
    rows = []
    for index, op in enumerate(ops):
        group = op.attr["group_ep" if "group_ep" in op.attr else "group"].s.decode()
        ranks = [int(rank) for rank in group.partition("rank_list=")[2].split(",") if rank]
        node = nodes[index] if len(nodes) == len(ops) else None
        rows.append(
            {
                "op": op.type,
                "name": op.name,
                "group": group,
                "ranks": ranks or list(graph.used_process_group.get(group, ([],))[0]),
                "sends": str(_bytes(node)) if node is not None else "",
                "module": module_of(node) if node is not None else "",
            }
        )
    return rows


def _fused(node: fx.Node) -> bool:
    """A product with its collective, torchair's own all-to-all, or rows to their experts and back."""
    schema = getattr(node.target, "_schema", None)
    names = {argument.name for argument in schema.arguments} if schema is not None else set()
    return bool(names & {"hcom", "ranks", "group_ep"})


def _bytes(node: fx.Node) -> Any:
    """What a rank gives to the collective, in bytes; of rows for experts, one for each of its tokens' choices."""
    given = arguments(node) if isinstance(node.target, OpOverload) else {}
    value = bound(node)[0].meta["val"]
    rows = given["expert_ids"].meta["val"].shape if "expert_ids" in given else value.shape[:-1]
    return product([size_expr(size) for size in (*rows, *value.shape[-1:])]) * value.element_size()


def _inputs(gm: fx.GraphModule, converted: Converted, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    concrete = converted.concrete
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    data = {op.attr["index"].i: op for op in concrete.graph.op if op.type in ("Data", "RefData")}
    rows = []
    for index, info in enumerate(concrete._input_info_list):
        packed = getattr(info.func, "fx_input_idx_list", None)  # sizes as one tensor
        of: Any = [converted.used[i] for i in packed] if packed else converted.used[info.func.fx_input_idx]
        row = {"name": data[index].name, "of": of, "shape": list(info.shape), "dtype": _dtype(data[index])}
        if not packed:
            assert row["name"] == names[of], f"input {index} is called {row['name']} and takes {names[of]}"
        if known:
            row |= {"source": [known[i]["source"] for i in of]} if packed else known[of]
        rows.append(row)
    return rows


def _dtype(op: Any) -> str:
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    return str(DataType.Name(op.output_desc[0].dtype))


def _outputs(converted: Converted) -> list[Any]:
    concrete, rows = converted.concrete, list[Any]()
    for index, output in enumerate(concrete._fx_outputs):
        if index in concrete._fx_outputs_mapping:
            rows.append(concrete._fx_outputs_mapping[index])
        elif hasattr(output, "_fx_input_index"):
            rows.append({"view of input": converted.used[output._fx_input_index]})
        else:
            rows.append({"value": str(getattr(output, "_ori_meta_sym", output))})
    return rows
