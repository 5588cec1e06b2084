"""What every node of a searched structure is worth, once the outcomes of its solutions are known.

A search backs values up before a verifier has spoken. `value_tree` says what the finished structure
is evidence of: V of the state behind each node and Q of the edge into it (spec A3), by one rule:

  search     the search's own V; a finished edge is worth its outcome
  x1         the search's values read as x1 reads them, as the worth of edges: Q = value and
             V = value / g (spec B5; golden G09), for structures of `td_mcts`
  weighted   backed up anew from the outcomes: V = sum N_c Q_c / sum N_c over visited children
             (AlphaZero's mean; golden G61), the evaluator's value at unfinished leaves
  max        V = max over visited children of Q: what the best play found is worth
  rollouts   V = mean discounted outcome of all finished solutions below (Monte Carlo; golden G08);
             nothing is said of nodes without one

`known` marks the nodes that something below them, or an outcome, speaks for. A leaf that holds
nothing but the network's own opinion teaches it nothing; nor does a node that was only seen in
passing on the way to another answer count as wrong: its value is a mean with its visits behind it,
and `min_visits` says how many are enough.

A node of which nothing could be grown - steps were written, and the task dropped all of them - is
a dead end: V is 0, as sure as an outcome. Without these the lost states that a search runs into
have no value but the network's own, and a maximum over such opinions only ever rises. Steps that
the end of the budget cut count too, though some such states are not lost: without them searches
taught less (docs/log.md, 2026-11-30).

An edge that ends a solution is worth its reward alone (V behind it is 0 by definition). As the
target of a value network a terminal node's V is that reward too, the Blueprint's terminal trick
(A3): the network can then stand in for the verifier.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.reasoning.structure import Structure, frontier, has_child, paths_up

VALUE_RULES = ("search", "x1", "weighted", "max", "rollouts")


@struct
class ValueTree:
    """What B structures are evidence of.

    value: V of the state behind each node; a terminal node's is its reward. edge: Q of the edge
    into it, 0 for the root. known: more than the evaluator's word for the node itself. weight:
    visits, or finished solutions below under "rollouts"; at least 1 at a finished solution.
    """

    value: Float32[Array, "B N"]
    edge: Float32[Array, "B N"]
    known: Bool[Array, "B N"]
    weight: Float32[Array, "B N"]


def value_tree(
    structure: Structure,
    rewards: Float32[Array, "B N"],
    *,
    rule: str = "weighted",
    discount: float = 1.0,
) -> ValueTree:
    """Values of all living nodes; 0 and not known elsewhere.

    Args:
      rewards: of the edge into each node, the verifier's outcome at terminal ones. Under "search"
        and "x1" those of other edges are in the values already where the search saw them.

    Raises:
      ValueError: the rule is unknown, or the discount is not in (0, 1].
    """
    if rule not in VALUE_RULES:
        raise ValueError(f"rule {rule!r}: accepted are {VALUE_RULES}")
    if not 0 < discount <= 1:
        raise ValueError(f"discount must be in (0, 1], got {discount}")
    rewards = jnp.where(structure.alive, rewards.astype(jnp.float32), 0.0)
    finished = structure.alive & structure.terminal
    dead_end = find_dead_ends(structure)
    ended = finished | dead_end
    visits = jnp.where(structure.alive, structure.visits, 0.0)
    visits = jnp.where(ended, jnp.maximum(visits, 1.0), visits)
    count, value = _back_up(structure, rewards, visits, ended, rule, discount)
    known = ended | (structure.alive & (count > 0))
    weight = visits
    if rule == "rollouts":
        weight = jnp.where(ended, 1.0, count)
    if rule in ("search", "x1"):
        value = structure.value
    edge = rewards + discount * value
    if rule == "x1":
        edge, value = value, value / discount
    value = jnp.where(finished, rewards, jnp.where(structure.alive & ~dead_end, value, 0.0))
    edge = jnp.where(ended, rewards, jnp.where(structure.alive, edge, 0.0)).at[:, 0].set(0.0)
    return ValueTree(value, edge, known, weight)


def find_dead_ends(structure: Structure) -> Bool[Array, "B N"]:
    """Living nodes, not ends themselves, whose children were all dropped as soon as they were made.

    A step that was never written, for want of budget, drops nothing; pruned children were visited,
    and those that were merged have a state.
    """
    made = jnp.arange(structure.capacity) < structure.num_nodes[:, None]
    gone = made & ~structure.alive & (structure.visits == 0) & (structure.span_length > 0)
    merged = gone & (structure.state_key != 0)
    return frontier(structure) & has_child(structure, gone) & ~has_child(structure, merged)


def target_weights(
    structure: Structure, tree: ValueTree, *, min_visits: float = 1.0
) -> Float32[Array, "B N"]:
    """1 for nodes whose value is a target, 0 for the others.

    Args:
      min_visits: least `weight` of an unfinished node; a finished one is exact and needs none.
    """
    finished = structure.alive & structure.terminal
    return (tree.known & (finished | (tree.weight >= min_visits))).astype(jnp.float32)


def _back_up(
    structure: Structure,
    rewards: Float32[Array, "B N"],
    visits: Float32[Array, "B N"],
    ended: Bool[Array, "B N"],
    rule: str,
    discount: float,
) -> tuple[Float32[Array, "B N"], Float32[Array, "B N"]]:
    """The weight behind each node's children and the node's V, level by level from the deepest.

    When a level is reached all that lies below it has been added.
    """
    depth = _find_levels(structure)
    rows = jnp.arange(visits.shape[0])[:, None, None]
    parents = structure.parents
    up = jnp.where(parents >= 0, parents, structure.capacity)
    leaf = jnp.where(structure.alive, structure.model_value, 0.0)

    def value_of(count: Array, total: Array) -> Array:
        mean = total if rule == "max" else total / jnp.maximum(count, 1.0)
        return jnp.where(count > 0, mean, jnp.zeros_like(leaf) if rule == "rollouts" else leaf)

    def climb(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        level, count, total = carry
        edge = rewards + jnp.where(ended, 0.0, discount * value_of(count, total))
        weight = jnp.where(ended, 1.0, count) if rule == "rollouts" else visits
        here = structure.alive & (depth == level) & (weight > 0)
        weight = jnp.where(here, weight, 0.0)
        count = count.at[rows, up].add(weight[..., None], mode="drop")
        if rule == "max":
            best = jnp.where(here, edge, -jnp.inf)[..., None]
            return level - 1, count, total.at[rows, up].max(best, mode="drop")
        return level - 1, count, total.at[rows, up].add((weight * edge)[..., None], mode="drop")

    top = depth[:, 0].min()
    levels = jnp.where(structure.alive, depth, top).max()
    start = jnp.full_like(visits, -jnp.inf) if rule == "max" else jnp.zeros_like(visits)
    carry = (levels, jnp.zeros_like(visits), start)
    _, count, total = jax.lax.while_loop(lambda c: c[0] > top, climb, carry)
    return count, value_of(count, total)


def _find_levels(structure: Structure) -> Int32[Array, "B N"]:
    """The longest way from the root: below all parents, where a node's depth is by its first."""
    if not structure.more_parents.shape[-1]:
        return structure.depth
    rows = jnp.arange(structure.depth.shape[0])[:, None, None]

    def deepen(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        old, _ = carry
        above = jnp.where(structure.parents >= 0, old[rows, jnp.maximum(structure.parents, 0)], -1)
        new = jnp.maximum(old, above.max(-1) + 1)
        return new, (new != old).any()

    start = (structure.depth, structure.depth.any() | True)
    return jax.lax.while_loop(lambda carry: carry[1], deepen, start)[0]


def trace_paths(
    structure: Structure, nodes: Int32[Array, "B"], max_depth: int
) -> Int32[Array, "B L"]:
    """Nodes on the way from the root (left out) to each structure's node, L = max_depth; -1 behind.

    Args:
      nodes: the ends, -1 for a structure without one. max_depth: steps of the longest path.
    """
    steps = paths_up(structure, nodes.astype(jnp.int32)[:, None], max_depth)[:, 0]
    steps = jnp.where(steps > 0, steps, -1)
    length = (steps > 0).sum(-1, keepdims=True)
    at = jnp.arange(max_depth)[None]
    reversed_at = jnp.clip(length - 1 - at, 0, max_depth - 1)
    return jnp.where(at < length, jnp.take_along_axis(steps, reversed_at, -1), -1)
