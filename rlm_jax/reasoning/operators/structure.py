"""Structure operators: what changes the topology (Blueprint 4.3.1).

`generate` appends the proposed steps as children. Slots are given out in order, the same way
wherever they are needed: the expander writes its pages and tokens under the indices that
`child_slots` names before `generate` runs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import add_budgets
from rlm_jax.core.types import Float32, Int32
from rlm_jax.reasoning.protocol import Outcome, Request
from rlm_jax.reasoning.structure import Structure


def child_slots(structure: Structure, request: Request) -> Int32[jax.Array, "B W K"]:
    """Indices that the children of a request will get; N (out of range) for idle lanes.

    Lanes that are active take K consecutive slots each, in lane order, from the first free one.
    """
    num_children = request.num_children
    before = jnp.cumsum(request.active, -1) - request.active
    start = structure.num_nodes[:, None] + before * num_children
    slots = start[..., None] + jnp.arange(num_children)
    return jnp.where(request.active[..., None], slots, structure.capacity).astype(jnp.int32)


def generate(
    structure: Structure, request: Request, outcome: Outcome, prior: Float32[jax.Array, "B W K"]
) -> tuple[Structure, Int32[jax.Array, "B W K"]]:
    """Appends the outcome's steps as children of the requested nodes.

    A child starts with one visit and the evaluator's value. A duplicate, and a lane that brought
    nothing, take their slot dead, so that the record shows what was paid for.

    Returns:
      The structure with the children and the cost in it, and the children's indices (N where a
      lane was idle).
    """
    slots = child_slots(structure, request)
    taken = jnp.broadcast_to(request.active[..., None], slots.shape)
    alive = taken & outcome.valid & ~outcome.duplicate
    parent = jnp.broadcast_to(request.nodes[..., None], slots.shape)
    budget = add_budgets(structure.budget, outcome.cost)

    def of_parent(array):
        lanes = jnp.maximum(request.nodes, 0)
        return jnp.broadcast_to(jnp.take_along_axis(array, lanes, 1)[..., None], slots.shape)

    def write(array, values):
        flat = values.reshape(values.shape[0], -1).astype(array.dtype)
        return jax.vmap(lambda a, i, v: a.at[i].set(v, mode="drop"))(
            array, slots.reshape(slots.shape[0], -1), flat
        )

    live = alive.astype(jnp.float32)
    operator = jnp.broadcast_to(request.operator[..., None], slots.shape)
    end = of_parent(structure.span_start) + of_parent(structure.span_length)
    created = jnp.broadcast_to(budget.generated_tokens[:, None, None], slots.shape)
    first_parent = write(structure.parents[..., 0], parent)
    return dataclasses.replace(
        structure,
        parents=structure.parents.at[..., 0].set(first_parent),
        operator=write(structure.operator, operator),
        depth=write(structure.depth, of_parent(structure.depth) + 1),
        span_start=write(structure.span_start, end),
        span_length=write(structure.span_length, outcome.length),
        visits=write(structure.visits, live),
        value=write(structure.value, outcome.value * live),
        model_value=write(structure.model_value, outcome.value * live),
        prior=write(structure.prior, prior),
        logprob=write(structure.logprob, outcome.logprob),
        reward=write(structure.reward, outcome.reward),
        answer_key=write(structure.answer_key, outcome.answer_key),
        created_at=write(structure.created_at, created),
        terminal=write(structure.terminal, outcome.terminal & alive),
        alive=write(structure.alive, alive),
        num_nodes=structure.num_nodes + taken.sum((1, 2)).astype(jnp.int32),
        budget=budget,
    ), slots
