"""An environment without a language model: a node's state is an RNG key.

The key of a child is its parent's folded with its rank, so the whole tree is a function of the
root key, whatever order a search grows it in. Values, lengths, ends and duplicates follow from
the key.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.operators.structure import child_slots
from rlm_jax.reasoning.protocol import Outcome
from rlm_jax.reasoning.structure import tokens_left


def make_world(keys, capacity):
    data = jnp.zeros((keys.shape[0], capacity), jnp.uint32)
    return data.at[:, 0].set(jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(keys))


def make_expand(
    terminal_rate=0.2,
    duplicate_rate=0.1,
    max_length=6,
    value_fn=None,
    num_states=1,
    proven_answer=0,
):
    """An expander with these rates; `value_fn(bits) -> value` replaces the random values.

    num_states: state keys are drawn below it (1: none). proven_answer: the answer that a verifier
    would accept (0: none).
    """

    def value_of(bits):
        if value_fn is not None:
            return jnp.broadcast_to(value_fn(bits), bits.shape).astype(jnp.float32)
        return jax.vmap(_uniform)(bits.reshape(-1)).reshape(bits.shape)

    def child(bits, slot, rank):
        del slot
        key = jax.random.fold_in(jax.random.key(bits), rank)
        names = ("bits", "length", "end", "copy", "answer", "state")
        k = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        new = jax.random.bits(k["bits"], dtype=jnp.uint32)
        return {
            "bits": new,
            "length": jax.random.randint(k["length"], (), 1, max_length + 1),
            "value": value_of(new),
            "terminal": jax.random.bernoulli(k["end"], terminal_rate),
            "duplicate": (rank > 0) & jax.random.bernoulli(k["copy"], duplicate_rate),
            "answer": jax.random.randint(k["answer"], (), 1, 4).astype(jnp.uint32),
            "state": jax.random.randint(k["state"], (), 0, num_states).astype(jnp.uint32),
        }

    def expand(params, keys, world, structure, request):
        del params, keys
        slots = child_slots(structure, request)
        # Chains ask for one child of the root several times: rank by slot keeps them apart.
        lanes = jnp.arange(request.nodes.shape[1])[None, :, None] * 1000
        ranks = jnp.arange(request.num_children)[None, None] + (
            lanes if request.num_children == 1 else 0 * lanes
        )
        ranks = jnp.broadcast_to(ranks, slots.shape)
        parent = jnp.take_along_axis(world, jnp.maximum(request.nodes, 0), 1)
        parent = jnp.broadcast_to(parent[..., None], slots.shape)
        made = jax.vmap(jax.vmap(jax.vmap(child)))(parent, slots, ranks)
        valid = jnp.broadcast_to(request.grows[..., None], slots.shape)
        num_rows = jnp.maximum(valid.sum((1, 2)), 1)
        cap = (tokens_left(structure) // num_rows)[:, None, None]
        length = jnp.where(valid, jnp.minimum(made["length"], cap), 0)
        rows = jnp.arange(slots.shape[0])[:, None, None]
        world = world.at[rows, slots].set(made["bits"], mode="drop")
        cost = zero_budget(structure.num_nodes).replace(
            generated_tokens=length.sum((1, 2)),
            model_calls=request.active.any(-1).astype(jnp.int32),
            expansions=request.active.sum(-1).astype(jnp.int32),
        )
        outcome = Outcome(
            valid=valid,
            duplicate=made["duplicate"] & valid & request.distinct,
            length=length,
            logprob=-length.astype(jnp.float32) * (1.1 + made["value"]),
            value=made["value"],
            reward=jnp.zeros_like(made["value"]),
            terminal=made["terminal"] & valid,
            answer_key=made["answer"],
            state_key=made["state"],
            proven=valid & made["terminal"] & (made["answer"] == proven_answer),
            node_value=value_of(jnp.take_along_axis(world, jnp.maximum(request.nodes, 0), 1)),
            cost=cost,
        )
        return outcome, world

    return expand


def _uniform(bits):
    return jax.random.uniform(jax.random.fold_in(jax.random.key(bits), 1_000_003), minval=-1.0)
