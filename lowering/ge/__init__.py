"""A reference interpreter of GE graphs: what torchair exported is itself executed on CPU, all ranks in lockstep.

``load`` reads an exported graph, ``GeProgram`` binds one rank's inputs, ``interpret`` runs every rank.
"""

from cpcompile.lowering.ge.executor import GeProgram, interpret, op_types
from cpcompile.lowering.ge.graph import GeError, GeGraph, GeOp
from cpcompile.lowering.ge.loader import load, parse

__all__ = ["GeError", "GeGraph", "GeOp", "GeProgram", "interpret", "load", "op_types", "parse"]
