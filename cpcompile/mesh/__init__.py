"""Parallel groups: from sizes and a rank order to the ranks of every group, and to process groups.

``rank_groups(Sizes(dp=4, tp=2, o_proj=4), "vllm")`` is data and needs no process; ``cpcompile.mesh.process_groups``
makes communicators of it.
"""

from cpcompile.mesh.groups import Communicator, Kind, RankGroups, rank_groups
from cpcompile.mesh.orders import ORDERS, Order
from cpcompile.mesh.sizes import Sizes

__all__ = ["ORDERS", "Communicator", "Kind", "Order", "RankGroups", "Sizes", "rank_groups"]
