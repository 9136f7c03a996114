"""Kinds of mutation: what a planner or an emitter could get wrong in one place of a rewritten graph."""

from fuzzing.mutations import collectives, layouts, outputs, rows, values
from fuzzing.mutations.table import KINDS, Mutation, NotHere

__all__ = ["KINDS", "Mutation", "NotHere", "collectives", "layouts", "outputs", "rows", "values"]
