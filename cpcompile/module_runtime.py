"""What compiled code with shared modules needs when it runs: parts of weights, limits on rows, an idle rank's step."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

from cpcompile.axes import resolve_group
from cpcompile.compiled import Compiled, token_reader
from cpcompile.errors import OptionError
from cpcompile.graph_inputs import GraphInput
from cpcompile.idle import register
from cpcompile.module_tp import Sharing
from cpcompile.options import Options
from cpcompile.passes.weight_recipes import Recipe, carry_out, collect_over
from cpcompile.replication import fingerprint
from cpcompile.weights import address, is_real, keep, local_tensor, part_of, release, why_kept

log = logging.getLogger("cpcompile")


def keep_parts(compiled: Compiled, inputs: Sequence[GraphInput], options: Options) -> dict[int, torch.Tensor]:
    """This rank's parts of the weights that it shares, by the place of the graph input that they stand for."""
    sharing = compiled.sharing
    if sharing is None or not sharing.recipes:
        return {}
    names = [node.name for node in compiled.original.graph.find_nodes(op="placeholder")]
    places = {names.index(name): name for name in sharing.recipes}
    with torch.no_grad(), _disable_current_modes():  # the backend runs under dynamo's fake mode
        parts = _made(places, sharing, inputs, options)
    if sharing.idle is not None:
        mine = [parts[names.index(node.name)] for node in sharing.idle.graph.find_nodes(op="placeholder")]
        weights = [local_tensor(inputs[place].value) for place in places]
        register(weights, functools.partial(sharing.idle.forward, *mine), sharing.not_idle)
    return parts


def _made(
    places: Mapping[int, str], sharing: Sharing, inputs: Sequence[GraphInput], options: Options
) -> dict[int, torch.Tensor]:
    parts, freed = {}, 0
    several = {id(given): given.value for given in inputs}.values()  # a DTensor is the input of its mesh, too
    owners = Counter(address(local_tensor(value)) for value in several if is_real(value))
    for place, name in places.items():
        whole, recipes = local_tensor(inputs[place].value), sharing.recipes[name]
        parts[place] = part_of(whole, recipes, functools.partial(_carried_out, recipes=recipes))
        if address(whole) and owners[address(whole)] > 1:
            keep(whole, "another input of the graph has the same memory")
        if options.release_weights:  # one after another: no more than one weight is there twice
            freed += release(whole, fingerprint)
            if why_kept(whole):
                log.warning("cpcompile: %s keeps its memory: %s", inputs[place].name, why_kept(whole))
    if freed:
        log.info("cpcompile: %d bytes of whole weights released", freed)
    return parts


def _carried_out(tensor: torch.Tensor, recipes: Sequence[Recipe]) -> torch.Tensor:
    collect = collect_over(lambda axis: resolve_group(axis.group_name))
    for recipe in recipes:
        tensor = carry_out(tensor, recipe, collect)
    return tensor


def examples_of(gm: fx.GraphModule, aot_inputs: Sequence[Any], parts: Collection[int]) -> list[Any]:
    """Example inputs with parts of weights in the place of the whole ones."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [placeholders[i].meta["val"] if i in parts else given for i, given in enumerate(aot_inputs)]


def row_limits(compiled: Compiled, options: Options) -> Callable[[Sequence[Any]], None]:
    """A check that a step has no more rows than the ranks that share modules pad to, where that is a number.

    Raises:
        OptionError: the numbers of rows cannot be told from the model's inputs.
    """
    limited = {rows for rows in (compiled.sharing.limited if compiled.sharing else ()) if not rows.is_number}
    readers = [token_reader(compiled.original, rows) for rows in limited]
    if None in readers:
        raise OptionError(
            f"group_tokens={options.group_tokens}: a step's rows cannot be told from the model's inputs: use 'exchange'"
        )

    def check(args: Sequence[Any]) -> None:
        for read in readers:
            if read is not None and read(args) > options.group_tokens:  # type: ignore[operator]
                raise OptionError(
                    f"this step has {read(args)} rows, and group_tokens={options.group_tokens}: give at least the most "
                    "rows of any rank, or 'exchange'"
                )

    return check
