"""The operator log of a search: every operator call as an event (spec A6; for trace data, A8).

A driver keeps what was requested and which nodes went, round by round (`Trace`). Together with the
finished structure that determines every event, in order:

  select         the node a lane chose
  backtrack      to that node, when it is not below the one grown before
  generate       a node and its children, alive
  discard        children that are dead from the start: equal to a sibling, or nothing was produced
  merge          a child and the living node of the same state that stands for it: the child is dead
  link           a node and one more parent that it has
  prune          nodes that are dead from here on
  evaluate       a node judged once more, without children
  backpropagate  from the node to the root
  keep_subtree   a node and all that was kept, itself first: nodes are numbered anew in that order

`refine`, `aggregate` and `restructure` stand as `generate` does. Whoever takes the events one by
one rebuilds the structure's parents and living nodes exactly.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32
from rlm_jax.reasoning.operators.structure import child_slots, put_children
from rlm_jax.reasoning.operators.traversal import backtracks
from rlm_jax.reasoning.protocol import Outcome, Request
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, path_to_root


@struct
class Trace:
    """What was requested and what went: the operator log in its compact form.

    nodes, operators: [B, R, W], of each round; rounds beyond R are not kept.
    removed: the round in which a step went that had been proposed as one of its own: pruned, or
      merged with an equal state; -1 for the others.
    first: slots that were in use when the log began.
    """

    nodes: Int32[Array, "B R W"]
    operators: Int32[Array, "B R W"]
    removed: Int32[Array, "B N"]
    first: Int32[Array, "B"]


class Event(NamedTuple):
    """One operator call. nodes: what it was applied to or made, see the module."""

    round: int
    operator: str
    nodes: tuple[int, ...]


def make_trace(structure: Structure, request: Request, num_rounds: int) -> Trace:
    """An empty log of `num_rounds` rounds of requests like this one."""
    batch, num_lanes = request.nodes.shape
    empty = jnp.broadcast_to(request.nodes[:, None] * 0, (batch, num_rounds, num_lanes))
    removed = structure.depth * 0 + NO_NODE
    return Trace(empty + NO_NODE, empty, removed, structure.num_nodes)


def clear_rows(trace: Trace, rows: Int32[Array, "F"], structure: Structure) -> Trace:
    """Empties rows of the log for new problems, which stand in `structure` already; B is no row."""

    def clear(log: Array) -> Array:
        return log.at[rows].set(NO_NODE, mode="drop")

    emptied = clear(trace.nodes), clear(trace.operators), clear(trace.removed)
    at = jnp.minimum(rows, structure.num_nodes.shape[0] - 1)
    return Trace(*emptied, trace.first.at[rows].set(structure.num_nodes[at], mode="drop"))


def log_round(
    trace: Trace,
    rounds: Int32[Array, "B"],
    request: Request,
    outcome: Outcome,
    before: Structure,
    after: Structure,
) -> Trace:
    """The log with one more round in it.

    Args:
      rounds: number of this round in each structure. request: of all lanes; `outcome` may be that
        of the first ones. before, after: the structure without and with what the round changed.
    """
    batch, num_lanes = outcome.node_value.shape
    nodes, operators = request.nodes[:, :num_lanes], request.operator[:, :num_lanes]
    asked = Request(nodes, operators, request.num_children)
    own = outcome.valid & ~outcome.duplicate & asked.grows[..., None]
    proposed = put_children(before.alive, child_slots(before, asked), own)
    at = jnp.where(request.active.any(-1), rounds, trace.nodes.shape[1])
    rows = jnp.arange(batch)
    return Trace(
        nodes=trace.nodes.at[rows, at].set(request.nodes, mode="drop"),
        operators=trace.operators.at[rows, at].set(request.operator, mode="drop"),
        removed=jnp.where(proposed & ~after.alive, rounds[:, None], trace.removed),
        first=trace.first,
    )


def read_events(trace: Trace, structure: Structure, row: int, num_children: int) -> list[Event]:
    """The events of one structure (host side).

    Args:
      row: its place in the batch. num_children: K of the strategy.

    Raises:
      ValueError: the search took more rounds than the log holds.
    """
    log = jax.tree.map(lambda array: np.asarray(array[row]), trace)
    one = jax.tree.map(lambda array: np.asarray(array[row]), structure)
    replay = _Replay(log, one, num_children)
    returns = iter(_find_returns(log.nodes, one.parent))
    backs_up = bool(one.visits[0] > 0)
    events: list[Event] = []
    for number, (lanes, kinds) in enumerate(zip(log.nodes, log.operators, strict=True)):
        taken = [(int(n), int(k)) for n, k in zip(lanes, kinds, strict=True) if n >= 0]
        for node, _ in taken:
            if next(returns):
                events.append(Event(number, "backtrack", (node,)))
            events.append(Event(number, "select", (node,)))
        events += replay.grow(number, taken)
        if backs_up:
            for node, _ in taken:
                path = tuple(path_to_root(structure, row, node)[::-1])
                events.append(Event(number, "backpropagate", path))
    if replay.num_nodes != one.num_nodes:
        raise ValueError(
            f"the log holds {len(log.nodes)} rounds and {replay.num_nodes} nodes of a structure "
            f"of {one.num_nodes}: log more rounds"
        )
    return events


def keep_event(number: int, node: int, order: np.ndarray) -> Event:
    """The event of `operators.structure.keep_subtree`; order: its second result, of one row."""
    kept = [int(old) for old in np.asarray(order) if old >= 0]
    return Event(number, "keep_subtree", (int(node), *kept))


def _find_returns(nodes: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """For each node taken, in order, whether the search went back for it."""
    order = nodes[nodes >= 0]
    size = 1 << len(order).bit_length()  # Few lengths: few programs.
    nodes, before = np.full((2, size), NO_NODE, np.int32)
    nodes[: len(order)], before[1 : len(order)] = order, order[:-1]
    return np.asarray(_backtracks(parent, before, nodes))


@jax.jit
def _backtracks(
    parent: Int32[Array, "N"], before: Int32[Array, "M"], nodes: Int32[Array, "M"]
) -> Bool[Array, "M"]:
    return backtracks(jnp.broadcast_to(parent, (len(nodes), len(parent))), before, nodes)


class _Replay:
    """The growth of one structure, told from its end: which nodes lived when."""

    def __init__(self, log: Trace, one: Structure, num_children: int):
        self.log, self.one, self.num_children = log, one, num_children
        self.num_nodes = int(log.first)
        used = np.arange(len(one.alive)) < self.num_nodes
        self.alive = used & (one.alive | (log.removed >= 0))
        self.linked: set[tuple[int, int]] = set()

    def grow(self, number: int, taken: list[tuple[int, int]]) -> Iterator[Event]:
        """Events of one round's lanes: what was made of it, and what went."""
        first = self.num_nodes
        for node, kind in taken:
            if kind == Operator.EVALUATE:
                yield Event(number, "evaluate", (node,))
                continue
            children = tuple(range(self.num_nodes, self.num_nodes + self.num_children))
            self.num_nodes += self.num_children
            yield Event(number, Operator(kind).name.lower(), (node, *children))
        born = slice(first, self.num_nodes)
        self.alive[born] = self.one.alive[born] | (self.log.removed[born] >= 0)
        unmade = first + np.flatnonzero(~self.alive[born])
        if unmade.size:
            yield Event(number, "discard", tuple(unmade.tolist()))
        gone = np.flatnonzero(self.alive & (self.log.removed == number)).tolist()
        self.alive[gone] = False
        twins = {child: self._find_twin(child) for child in gone if child >= first}
        for child, twin in twins.items():
            if twin >= 0:
                yield Event(number, "merge", (child, twin))
                yield from self._link(number, twin, int(self.one.parent[child]))
        pruned = tuple(node for node in gone if twins.get(node, NO_NODE) < 0)
        if pruned:
            yield Event(number, "prune", pruned)

    def _find_twin(self, child: int) -> int:
        """The living node whose state a child reached, -1 where it was pruned for itself."""
        key = self.one.state_key[child]
        # What was merged never counted; what was pruned at once may have.
        if key == 0 or self.one.visits[child] > 0:
            return NO_NODE
        same = np.flatnonzero(self.alive & (self.one.state_key == key))
        return int(same[0]) if same.size else NO_NODE

    def _link(self, number: int, node: int, parent: int) -> Iterator[Event]:
        """The edge from `parent`, if the structure has it and it was not told of before."""
        if parent in self.one.more_parents[node] and (node, parent) not in self.linked:
            self.linked.add((node, parent))
            yield Event(number, "link", (node, parent))
