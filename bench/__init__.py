"""Benchmarks: ``python -m bench`` prints every table that the README quotes."""
