"""Where tokens go: routing tables and what they say, the tokens of every expert, and sending tokens elsewhere."""

from hooked_moe.routing.routing_table import ROUTES, RoutingTable, routing_table

__all__ = ["ROUTES", "RoutingTable", "routing_table"]
