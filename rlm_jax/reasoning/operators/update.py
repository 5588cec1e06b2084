"""Update operators: what changes the content of nodes and not the topology (Blueprint 4.3.3).

Every rule of `backpropagate` climbs from the requested nodes to the root, the deepest first, so
that a node where several lanes meet is updated once for all of them. Q(c) = r(c) + g V(c) below,
r the reward of the edge into the child c, g the discount, N visits.

  mean      V becomes the mean of all returns that passed through the node (AlphaZero, AlphaMath;
            spec B12.1, B12.7)
  max       V = max over visited children of Q
  weighted  V = sum N_c Q_c / sum N_c over visited children (ReST-MCTS*, MCTS-DPO; spec C4.2, G55)
  td        V = (1 - a) V + a sum N_c Q_c / sum N_c (x1, spec B2; golden G06): `weighted` with a
            learning rate
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.reasoning.structure import NO_NODE, Structure, at_nodes, peek_at, put_at, revise_at

BACKUPS = ("mean", "max", "weighted", "td")
BackupRule = str  # one of BACKUPS


class Backup(NamedTuple):
    """What a backup adds up: a lane's visits and their values, and its change of open leaves."""

    count: Float32[Array, "B W"]
    total: Float32[Array, "B W"]
    opened: Int32[Array, "B W"]


def backpropagate(
    structure: Structure,
    first_child: Int32[Array, "B N"],
    open_leaves: Int32[Array, "B N"],
    nodes: Int32[Array, "B W"],
    backup: Backup,
    *,
    num_children: int,
    rule: BackupRule = "mean",
    discount: float = 1.0,
    learning_rate: float = 1.0,
) -> tuple[Structure, Int32[Array, "B N"], Int32[Array, "B W"]]:
    """Backs values up from `nodes`, and counts the leaves that opened or closed below each node.

    Args:
      first_child: index of a node's first child, its children being consecutive; -1 for a leaf.
      nodes: where each lane starts, -1 for a lane that does nothing.
      backup: `total` is the sum of `count` values seen from the node; the rules that recompute a
        node from its children read it at leaves alone.

    Returns:
      The structure with new visits and values, the new `open_leaves`, and the child of the root
      at or above each lane's node (-1 for the root itself and for lanes that did nothing).
    """
    parents = structure.parent
    alone = nodes.shape[1] == 1  # Nobody to meet: it climbs at its own pace.
    # Levels count from each structure's own root, whose depth is not 0 once a subtree was kept.
    depth = at_nodes(structure.depth, nodes) - structure.depth[:, :1]
    levels = jnp.where(nodes >= 0, depth, -1)

    def goes_on(carry):
        level, lanes = carry[:2]
        return (lanes >= 0).any() if alone else level >= 0

    def climb(carry):
        level, lanes, levels, top, total, visits, value, opened = carry
        here = lanes >= 0 if alone else levels == level
        at = jnp.where(here, lanes, structure.capacity)
        visits = put_at(visits, at, backup.count, add=True)
        opened = put_at(opened, at, backup.opened, add=True)
        if rule == "mean":
            weight = jnp.maximum(peek_at(visits, lanes), 1.0)
            if alone:
                value = revise_at(
                    value, at, lambda old: old + (total - old * backup.count) / weight
                )
            else:
                # Linear in the lanes, so that lanes which meet add up.
                missing = (total - at_nodes(value, lanes) * backup.count) / weight
                value = put_at(value, at, missing, add=True)
            reward = peek_at(structure.reward, lanes)
            total = jnp.where(here, backup.count * reward + discount * total, total)
        else:
            children = _Children(structure, first_child, lanes, num_children)
            seen, new = children.combine(visits, value, rule, discount)
            if rule == "td":
                new = (1.0 - learning_rate) * at_nodes(value, lanes) + learning_rate * new
            own = total / jnp.maximum(backup.count, 1.0)
            value = put_at(value, at, jnp.where(seen, new, own))
        top = jnp.where(here & (lanes > 0), lanes, top)
        lanes = jnp.where(here, peek_at(parents, lanes), lanes)
        if not alone:
            level, levels = level - 1, jnp.where(here, levels - 1, levels)
        return level, lanes, levels, top, total, visits, value, opened

    lanes = (nodes, levels, nodes * 0 + NO_NODE, backup.total)
    carry = (levels.max(), *lanes, structure.visits, structure.value, open_leaves)
    carry = jax.lax.while_loop(goes_on, climb, carry)
    *_, top, _, visits, value, opened = carry
    return dataclasses.replace(structure, visits=visits, value=value), opened, top


def add_to_paths(
    structure: Structure,
    counts: Int32[Array, "B N"],
    nodes: Int32[Array, "B L"],
    change: Int32[Array, "B L"] | Bool[Array, "B L"],
) -> Int32[Array, "B N"]:
    """Adds each node's change to it and to all above it, along first parents; -1 adds nothing."""
    change = change.astype(jnp.int32)

    def climb(carry):
        lanes, counts = carry
        at = jnp.where(lanes >= 0, lanes, structure.capacity)
        counts = put_at(counts, at, change, add=True)
        above = at_nodes(structure.parent, lanes)
        return jnp.where(lanes >= 0, above, -1), counts

    return jax.lax.while_loop(lambda carry: (carry[0] >= 0).any(), climb, (nodes, counts))[1]


def weighted_mean(
    value: Float32[Array, "*R K"], visits: Float32[Array, "*R K"], *, min_visits: float = 0.0
) -> Float32[Array, "*R"]:
    """sum N Q / sum N over children that were visited (CPL; golden G56); 0 where none was.

    Args:
      min_visits: what a child's N counts for at least; 1 is MCTS-DPO's max(1, N) (golden G55).
    """
    visits = jnp.maximum(visits, min_visits)
    return (visits * value).sum(-1) / jnp.maximum(visits.sum(-1), 1.0)


class _Children:
    """The children of nodes [B, W], and a value made of theirs."""

    def __init__(self, structure, first_child, nodes, num_children):
        first = at_nodes(first_child, nodes)
        kids = jnp.maximum(first, 0)[..., None] + jnp.arange(num_children)
        self.kids = jnp.minimum(kids, structure.capacity - 1)
        # A window may be wider than a node's own children, and reach beyond the last node.
        own = at_nodes(structure.parent, self.kids) == jnp.maximum(nodes, 0)[..., None]
        own &= kids < structure.capacity
        self.real = own & at_nodes(structure.alive, self.kids) & (first >= 0)[..., None]
        self.reward = at_nodes(structure.reward, self.kids)

    def combine(self, visits, value, rule, discount):
        """Whether any child was visited, and the max or weighted mean of their Q."""
        count = jnp.where(self.real, at_nodes(visits, self.kids), 0.0)
        q = self.reward + discount * at_nodes(value, self.kids)
        best = jnp.where(count > 0, q, -jnp.inf).max(-1)
        return (count > 0).any(-1), best if rule == "max" else weighted_mean(q, count)
