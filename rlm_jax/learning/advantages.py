"""Advantages of the edges of a searched tree (Blueprint App. C.3, Algorithm 6; spec B5).

A(edge into n) = Q(edge) - V(state before it), both from `targets.value_tree`. As printed, the
algorithm adds both the reward and the value at a terminal edge; the value behind the end of a
solution is 0, so here a terminal edge is worth its reward alone (golden G09). Under the rules
"weighted" and "x1" (learning rate 1) the visit-weighted advantages of siblings sum to zero (G61):
an edge is good only against its siblings, which is what makes V the baseline.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.learning.targets import ValueTree
from rlm_jax.reasoning.structure import Structure, has_child


def tree_advantages(structure: Structure, tree: ValueTree) -> Float32[Array, "B N"]:
    """Advantage of the edge into each living node, from its first parent; 0 for root and others."""
    at = jnp.maximum(structure.parent, 0)
    before = jnp.take_along_axis(tree.value, at, axis=1)
    real = structure.alive & (structure.parent >= 0)
    return jnp.where(real, tree.edge - before, 0.0)


def path_advantages(
    advantages: Float32[Array, "B N"], paths: Int32[Array, "B L"]
) -> Float32[Array, "B L"]:
    """Advantages along paths of `targets.trace_paths`; 0 where a path has ended."""
    found = jnp.take_along_axis(advantages, jnp.maximum(paths, 0), axis=1)
    return jnp.where(paths >= 0, found, 0.0)


def leads_to(structure: Structure, ends: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
    """Living nodes at or above one of `ends`, over any of several parents. Above the ends of all
    solutions stands what x1 keeps of a tree for training (spec B5, PRUNE)."""

    def climb(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        leads, _ = carry
        above = (leads | has_child(structure, leads)) & structure.alive
        return above, (above != leads).any()

    ends = ends & structure.alive
    return jax.lax.while_loop(lambda carry: carry[1], climb, (ends, ends.any()))[0]
