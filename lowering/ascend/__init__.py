"""Ascend: GE graphs through torchair, on an NPU host and, without one, as text."""
