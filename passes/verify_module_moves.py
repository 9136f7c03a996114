"""What padding, slices and collectives make of values, for the static proof of module tensor parallelism.

No chain of ops is expected: any that leads to the same elements will do. A collective is judged from one rank, where
every rank of the group runs the same chain on its own rows and its own parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from cpcompile.axes import Axis
from cpcompile.passes.verify_arguments import LAST, Argument, Refused
from cpcompile.passes.verify_index import (
    Dims,
    Shape,
    Size,
    divide,
    is_row_major,
    merged,
    product,
    regroup,
    row_major,
    same,
    shape,
    times,
)
from cpcompile.passes.verify_module_counts import RowNumbers
from cpcompile.passes.verify_module_values import Value, extent_of, leading, led_by


class Moves:
    """Moves of values among ranks.

    Args:
        numbers: what is known of N.
        axes: groups by their names.
        size_of: elements of a content.
        common: whether a content is the same on all ranks of a group.
    """

    def __init__(
        self,
        numbers: RowNumbers,
        axes: Mapping[str, Axis],
        size_of: Callable[[int], Size],
        common: Callable[[int, Axis | None], bool],
    ) -> None:
        """See the class."""
        self.numbers, self.axes, self.size_of, self.common = numbers, axes, size_of, common

    # On this rank.

    def padded(self, value: Value, args: Mapping[str, Argument]) -> Value:
        """This rank's rows and pad rows of any content, N in all."""
        amounts, sizes = args["pad"], shape(value.dims)
        if not value.whole or not sizes or len(amounts) != 2 * len(sizes) or any(amounts[:-1]):
            raise Refused("expected rows of this rank, padded behind the last one in dim 0", 2)
        count = times(1, sizes[0] + amounts[-1])
        self.numbers.check(count, sizes[0])
        if not isinstance(product(sizes[1:]), int):
            raise Refused(f"expected rows of a known size to be padded; found {list(sizes)}", 2)
        return Value(value.content, row_major((count, *sizes[1:])), value.dims, count)

    def narrowed(self, value: Value, args: Mapping[str, Argument]) -> list[Value]:
        """This rank's rows without the padding, or this rank's part of the columns."""
        sizes = shape(value.dims)
        dim, first, last = args["dim"] % len(sizes), args["start"] or 0, args["end"]
        last = sizes[dim] if last is None or last == LAST else last
        if args["step"] != 1:
            return []
        if value.base is not None and dim == 0 and value.local:
            return [self._own_rows(value, first, last)]
        if value.partial or value.part is not None:
            return []
        found = []
        for axis in self.axes.values():
            inner = divide(sizes[dim], axis.size)
            if inner is None or not same(first, times(inner, axis.rank)) or not same(last, first + inner):
                continue
            groups = regroup((value.dims[dim],), (axis.size, inner))
            free = value.axis in (None, axis) and not (value.gathered and dim == 0)
            if free and groups is not None and len(groups[0]) == 1:
                dims = (*value.dims[:dim], groups[1], *value.dims[dim + 1 :])
                found.append(replace(value, dims=dims, part=groups[0][0][1], axis=axis))
        return found

    def _own_rows(self, value: Value, first: Size, last: Size) -> Value:
        assert value.base is not None and value.count is not None
        base = shape(value.base)
        if not same(first, 0) or not same(last, base[0]):
            raise Refused(f"expected rows 0:{base[0]} of the padded ones; found {first}:{last}", 3)
        rest = value.dims[1:]
        view = regroup(value.base, (base[0], *shape(rest))) if is_row_major(rest) else None
        if view is None or value.dims[0] != merged([(value.count, product(base[1:]))]):
            raise Refused("expected the columns of each row in their order; found them permuted", 2)
        return Value(value.content, view)

    # Among ranks.

    def communicated(self, kind: str, value: Value, axis: Axis, args: Mapping[str, Argument]) -> Value:
        """What a collective over ``axis`` makes of ``value``.

        Raises:
            Refused: nothing that can be said.
        """
        found = self._communicated(kind, value, axis, args)
        return replace(found, axis=None) if found.local else found

    def _communicated(self, kind: str, value: Value, axis: Axis, args: Mapping[str, Argument]) -> Value:
        if args.get("group_size", axis.size) != axis.size:
            raise Refused(f"expected group_size {axis.size}; found {args['group_size']}", 3)
        if value.axis is not None and value.axis != axis:
            raise Refused(f"expected a collective over {value.axis.group_name}; found {axis.group_name}", 3)
        if kind == "all_gather_into_tensor":
            return self._gathered(value, axis)
        if kind == "all_to_all_single":
            return self._exchanged(value, axis, args)
        if kind not in ("all_reduce", "reduce_scatter_tensor"):
            raise Refused(f"nothing is known of {kind}")
        if not value.partial or args["reduce_op"] != "sum":
            raise Refused(f"expected the sum of summands; found {kind} {args['reduce_op']} of what is none", 3)
        return replace(value, partial=False) if kind == "all_reduce" else self._scattered(value, axis)

    def _gathered(self, value: Value, axis: Axis) -> Value:
        if value.partial:
            raise Refused("expected summands to be summed; found them gathered", 3)
        if value.part is not None:
            if not value.gathered and not self.common(value.content, axis):
                raise Refused("expected the parts of one value; found every rank's part of its own rows", 3)
            return replace(value, dims=led_by((axis.size, value.part), value.dims), part=None)
        return self._of_all_ranks(value, axis, value.dims)

    def _of_all_ranks(self, value: Value, axis: Axis, dims: Dims, part: Size | None = None) -> Value:
        """Own rows, of every rank, as ``dims`` behind the digit of the ranks."""
        self._check_as_many(value, axis)
        digit = (axis.size, extent_of(value, self.size_of(value.content)))
        return replace(value, dims=led_by(digit, dims), gathered=True, part=part, axis=axis)

    def _check_as_many(self, value: Value, axis: Axis) -> None:
        if not value.local:
            raise Refused("expected this rank's rows; found those of all ranks, or a part of them", 3)
        if value.count is not None:
            if not self.numbers.covers(value.count, axis):
                raise Refused(f"expected {value.count} to be agreed on by all of {axis.group_name}", 3)
        elif not self.numbers.is_equal(axis) and not self.common(value.content, axis):
            raise Refused("expected rows padded to N, as ranks may have different numbers of them", 3)

    def _exchanged(self, value: Value, axis: Axis, args: Mapping[str, Argument]) -> Value:
        rows: Shape = shape(value.dims)[:1]
        block = divide(rows[0], axis.size) if rows else None
        for name in ("input_split_sizes", "output_split_sizes"):
            splits = args[name]
            if block is None or len(splits) != axis.size or not all(same(s, block) for s in splits):
                raise Refused(f"expected {axis.size} equal {name}; found {list(splits)}", 3)
        led = leading(value.dims, axis.size)
        if led is None or value.partial:
            raise Refused("expected one block for each rank along dim 0", 3)
        stride, rest = led
        if value.gathered and value.part is not None:
            if stride != extent_of(value, self.size_of(value.content)):
                raise Refused("expected each rank's rows one after another along dim 0", 3)
            return replace(value, dims=led_by((axis.size, value.part), rest), gathered=False, part=None)
        return self._of_all_ranks(value, axis, rest, stride)

    def _scattered(self, value: Value, axis: Axis) -> Value:
        led = leading(value.dims, axis.size)
        if led is None:
            raise Refused("expected each rank's rows one after another along dim 0; found them interleaved", 3)
        stride, rest = led
        if value.gathered and stride == extent_of(value, self.size_of(value.content)):
            return replace(value, dims=rest, gathered=False, partial=False)
        return replace(value, dims=rest, part=stride, partial=False)
