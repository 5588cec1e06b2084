"""Descents of a tree search: from nodes down to leaves, by a score over siblings.

`descend` goes down from several nodes at once, in disjoint subtrees; `descend_in_passes` does so
again and again, each pass under virtual visits over the paths before it. A descent never enters a
subtree that is exhausted and never ends in one (`State.open_leaves`). Nothing here changes a tree.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import masked_argmax
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32, PyTree
from rlm_jax.reasoning.protocol import Keys
from rlm_jax.reasoning.structure import NO_NODE, Structure, at_nodes, at_windows, peek_at
from rlm_jax.reasoning.tree_config import TreeConfig

_TIES = 2**31 - 2  # A number that no node has: ties are drawn from the problem's key too.


@struct
class State:
    """first_child: a node's first child (its children are consecutive), -1 for a leaf.

    open_leaves: leaves at or below the node that can still be selected. simulations: leaves
    selected so far, the root apart. noise: to be mixed into the root's prior. extra: what one
    strategy adds.
    """

    first_child: Int32[Array, "B N"]
    open_leaves: Int32[Array, "B N"]
    simulations: Int32[Array, "B"]
    noise: Float32[Array, "B R"] | None = None
    extra: PyTree = None


class Siblings(NamedTuple):
    """What a score sees: K children [B, L, K] of the nodes [B, L].

    q: reward + discount * value; undiscounted: reward + value. visits: with the virtual ones, of
    paths that passed in this round, which are `virtual` alone. node_*: of the parent. open_leaves:
    at or below each child, those that are left to select. alive: living children of the node.
    """

    q: Float32[Array, "B L K"]
    undiscounted: Float32[Array, "B L K"]
    visits: Float32[Array, "B L K"]
    virtual: Float32[Array, "B L K"]
    prior: Float32[Array, "B L K"]
    open_leaves: Int32[Array, "B L K"]
    alive: Bool[Array, "B L K"]
    node_value: Float32[Array, "B L"]
    node_visits: Float32[Array, "B L"]
    node_model_value: Float32[Array, "B L"]

    @property
    def available(self) -> Bool[Array, "*nodes K"]:
        """Children that may be selected."""
        return self.open_leaves > 0


ScoreFn = Callable[[Siblings], Float32[Array, "B L K"]]


def descend(
    state: State,
    structure: Structure,
    nodes: Int32[Array, "B L"],
    keys: Keys,
    *,
    cfg: TreeConfig,
    score_fn: ScoreFn,
) -> Int32[Array, "B L"]:
    """From each node down to a leaf, all lanes at once: they must start in disjoint subtrees."""

    def step(carry):
        nodes, first = carry
        kids, siblings = look_below(state, structure, nodes, cfg, first)
        below = _choose_child(kids, siblings, structure, keys, cfg, score_fn)
        nodes = jnp.where(first >= 0, below, nodes)
        return nodes, find_first(state, nodes)

    start = (nodes, find_first(state, nodes))
    return jax.lax.while_loop(lambda carry: (carry[1] >= 0).any(), step, start)[0]


def descend_in_passes(
    state: State,
    structure: Structure,
    nodes: Int32[Array, "B L"],
    keys: Keys,
    passes: Int32[Array, "B"],
    *,
    num_passes: int,
    cfg: TreeConfig,
    score_fn: ScoreFn,
) -> Int32[Array, "B P L"]:
    """`descend` again and again, each time under virtual visits over the paths before.

    A path takes one open leaf away from every node that it passes, for the passes after it.

    Args:
      passes: of each structure, at most P = num_passes; -1 is returned for those beyond.
    """
    shape = (nodes.shape[0], num_passes, nodes.shape[1])
    empty = jnp.broadcast_to(nodes[:, None], shape) * 0 + NO_NODE

    def descend_once(index, carry):
        leaves, paths = carry
        starts = jnp.where(index < passes[:, None], nodes, NO_NODE)
        leaf, path = _descend_beside(
            paths, state, structure, starts, keys, cfg=cfg, score_fn=score_fn
        )
        return leaves.at[:, index].set(leaf), paths.at[:, index].set(path)

    paths = jnp.broadcast_to(empty[..., None], (*shape, cfg.max_depth + 1))
    return jax.lax.fori_loop(0, passes.max(), descend_once, (empty, paths))[0]


def find_first(state: State, nodes: Int32[Array, "B L"]) -> Int32[Array, "B L"]:
    """The first child of each node; -1 for a leaf, and for node -1."""
    # Not `peek_at`: of a node known in advance, the root, a slice is taken out of the write itself.
    return jnp.where(nodes >= 0, at_nodes(state.first_child, nodes), NO_NODE)


def look_below(
    state: State,
    structure: Structure,
    nodes: Int32[Array, "B L"],
    cfg: TreeConfig,
    first: Int32[Array, "B L"],
) -> tuple[Int32[Array, "B L K"], Siblings]:
    """The children of each node and what is known of them; none is available below a leaf.

    Args:
      first: `find_first` of the nodes.
    """
    kids = jnp.maximum(first, 0)[..., None] + jnp.arange(cfg.num_root_children, dtype=jnp.int32)
    if cfg.root_lanes > 1:
        # The window is the root's; other nodes have fewer children, and others' lie behind them.
        inside = kids < structure.capacity
        kids = jnp.minimum(kids, structure.capacity - 1)
        read = functools.partial(at_nodes, nodes=kids)
        own = inside & (read(structure.parent) == jnp.maximum(nodes, 0)[..., None])
    else:
        read = functools.partial(at_windows, first=kids[..., 0], size=cfg.num_children)
        own = True
    value, reward, visits = map(read, (structure.value, structure.reward, structure.visits))
    siblings = Siblings(
        q=reward + cfg.discount * value,
        undiscounted=reward + value,
        visits=visits,
        virtual=jnp.zeros_like(visits),
        prior=read(structure.prior),
        open_leaves=jnp.where(own, read(state.open_leaves), 0),
        alive=read(structure.alive) & own,
        node_value=peek_at(structure.value, nodes),
        node_visits=peek_at(structure.visits, nodes),
        node_model_value=peek_at(structure.model_value, nodes),
    )
    return kids, siblings


def _descend_beside(
    paths: Int32[Array, "B P L D"],
    state: State,
    structure: Structure,
    nodes: Int32[Array, "B L"],
    keys: Keys,
    *,
    cfg: TreeConfig,
    score_fn: ScoreFn,
) -> tuple[Int32[Array, "B L"], Int32[Array, "B L D"]]:
    """One more pass: its leaves and its paths, the nodes they start from first."""

    def step(carry):
        level, nodes, first, path = carry
        kids, siblings = look_below(state, structure, nodes, cfg, first)
        passed = (paths[..., level + 1, None] == kids[:, None]).sum(1)
        siblings = siblings._replace(
            visits=siblings.visits + passed,
            virtual=siblings.virtual + passed,
            node_visits=siblings.node_visits + (paths[..., level] == nodes[:, None]).sum(1),
            open_leaves=siblings.open_leaves - passed,
        )
        below = _choose_child(kids, siblings, structure, keys, cfg, score_fn)
        path = path.at[..., level + 1].set(jnp.where(first >= 0, below, NO_NODE))
        nodes = jnp.where(first >= 0, below, nodes)
        return level + 1, nodes, find_first(state, nodes), path

    path = jnp.broadcast_to(nodes[..., None] * 0 + NO_NODE, (*nodes.shape, cfg.max_depth + 1))
    start = (jnp.zeros((), jnp.int32), nodes, find_first(state, nodes), path.at[..., 0].set(nodes))
    _, leaves, _, path = jax.lax.while_loop(lambda carry: (carry[2] >= 0).any(), step, start)
    return leaves, path


def _choose_child(kids, siblings, structure, keys, cfg, score_fn):
    """The best available child; equal scores go to the first, or to a random one."""
    scores, available = score_fn(siblings), siblings.available
    if cfg.tie_break == "random":
        scores = jnp.where(available, scores, -jnp.inf)
        available &= scores == scores.max(-1, keepdims=True)
        fold = jax.vmap(jax.random.fold_in)
        ties = fold(fold(keys, jnp.full_like(structure.num_created, _TIES)), structure.num_created)
        scores = jax.vmap(lambda key: jax.random.uniform(key, scores.shape[1:]))(ties)
    best = masked_argmax(scores, available)[0]
    return jnp.take_along_axis(kids, best[..., None], -1)[..., 0]
