"""The operator log of a search: every operator call as an event (spec A6; for trace data, A8).

A driver keeps what was requested, round by round (`drive.Trace`); together with the finished
structure that determines every event, in order:

  select         the node a lane chose
  backtrack      to that node, when it is not below the one grown before
  generate       its children, duplicates among them marked dead in the structure
  evaluate       a node judged once more, without children
  backpropagate  from the node to the root
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlm_jax.reasoning.drive import Trace
from rlm_jax.reasoning.operators.traversal import backtracks
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, path_to_root


class Event(NamedTuple):
    """One operator call. nodes: what it was applied to or made, see the module."""

    round: int
    operator: str
    nodes: tuple[int, ...]


def read_events(
    trace: Trace, structure: Structure, row: int, num_children: int, *, backs_up: bool = True
) -> list[Event]:
    """The events of one structure (host side).

    Args:
      row: its place in the batch. num_children: K of the strategy. backs_up: whether the strategy
        backs values up.
    """
    nodes, operators = np.asarray(trace.nodes[row]), np.asarray(trace.operators[row])
    events: list[Event] = []
    next_slot = 1
    order = nodes[nodes >= 0]
    before = np.concatenate([[NO_NODE], order[:-1]]).astype(np.int32)[: len(order)]
    parents = jnp.broadcast_to(structure.parent[row], (len(order), structure.capacity))
    returns = iter(np.asarray(backtracks(parents, jnp.asarray(before), jnp.asarray(order))))
    for number, (lanes, kinds) in enumerate(zip(nodes, operators, strict=True)):
        taken = [(int(n), int(k)) for n, k in zip(lanes, kinds, strict=True) if n >= 0]
        for node, _ in taken:
            if next(returns):
                events.append(Event(number, "backtrack", (node,)))
            events.append(Event(number, "select", (node,)))
        for node, kind in taken:
            if kind == Operator.EVALUATE:
                events.append(Event(number, "evaluate", (node,)))
                continue
            children = tuple(range(next_slot, next_slot + num_children))
            events.append(Event(number, Operator(kind).name.lower(), (node, *children)))
            next_slot += num_children
        if backs_up:
            for node, _ in taken:
                path = tuple(path_to_root(structure, row, node)[::-1])
                events.append(Event(number, "backpropagate", path))
    return events
