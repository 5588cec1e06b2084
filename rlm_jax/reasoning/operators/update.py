"""Update operators: what changes the content of nodes and not the topology (Blueprint 4.3.3)."""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Float32, Int32
from rlm_jax.reasoning.structure import Structure


def backpropagate(
    structure: Structure,
    nodes: Int32[jax.Array, "B W"],
    total: Float32[jax.Array, "B W"],
    count: Float32[jax.Array, "B W"],
) -> Structure:
    """Adds `count` visits worth `total` to each node and all its ancestors; values are means.

    All lanes climb together: sums commute, so lanes whose paths meet add up to what they would
    have given one after the other. A lane with a negative node does nothing.
    """
    rows = jnp.arange(nodes.shape[0])[:, None]
    parents = structure.parents[..., 0]

    def climb(carry):
        lane, sums, visits = carry
        at = jnp.where(lane >= 0, lane, structure.capacity)
        sums = sums.at[rows, at].add(total, mode="drop")
        visits = visits.at[rows, at].add(count, mode="drop")
        above = jnp.take_along_axis(parents, jnp.maximum(lane, 0), 1)
        return jnp.where(lane >= 0, above, -1), sums, visits

    zero = jnp.zeros_like(structure.value)
    _, sums, added = jax.lax.while_loop(
        lambda carry: (carry[0] >= 0).any(), climb, (nodes, zero, zero)
    )
    visits = structure.visits + added
    mean = (structure.value * structure.visits + sums) / jnp.maximum(visits, 1.0)
    return dataclasses.replace(
        structure, visits=visits, value=jnp.where(added > 0, mean, structure.value)
    )
