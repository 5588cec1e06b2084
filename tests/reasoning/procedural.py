"""An environment without a language model: a node's state is a random number.

The number of a child is its parent's hashed with its rank, so the whole tree is a function of the
root's number, whatever order a search grows it in. Values, lengths, ends and duplicates follow from
it by more hashing (integer arithmetic, which compiles in no time, unlike JAX's generators).
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.operators.structure import child_numbers, child_slots
from rlm_jax.reasoning.protocol import Outcome
from rlm_jax.reasoning.structure import at_nodes, tokens_left


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
    refused_rate=0.0,
):
    """An expander with these rates; `value_fn(bits) -> value` replaces the random values.

    num_states: state keys are drawn below it (1: none). proven_answer: the answer that a verifier
    would accept (0: none). refused_rate: of steps that a task refuses; a second try is another.
    """

    def value_of(bits):
        if value_fn is not None:
            return jnp.broadcast_to(value_fn(bits), bits.shape).astype(jnp.float32)
        return 2.0 * uniform(bits, 1) - 1.0

    def make_children(parent, ranks):
        new = fold(parent, ranks + 17)
        return {
            "bits": new,
            "length": 1 + (fold(new, 2) % max_length).astype(jnp.int32),
            "value": value_of(new),
            "terminal": uniform(new, 3) < terminal_rate,
            "duplicate": (ranks > 1) & (uniform(new, 4) < duplicate_rate),
            "answer": 1 + fold(new, 5) % 3,
            "state": fold(new, 6) % num_states,
        }

    def expand(params, keys, world, structure, request):
        del params, keys
        slots = child_slots(structure, request)
        # The root may be sampled several times, by several lanes or anew.
        ranks = jnp.where(
            (request.nodes == 0)[..., None],
            child_numbers(structure, request),
            jnp.arange(1, request.num_children + 1),
        )
        parent = at_nodes(world, request.nodes)
        parent = jnp.broadcast_to(parent[..., None], slots.shape)
        made = make_children(parent, ranks)
        grown = jnp.broadcast_to(request.grows[..., None], slots.shape)
        numbers = child_numbers(structure, request)
        valid = grown & (uniform(fold(made["bits"], numbers), 7) >= refused_rate)
        num_rows = jnp.maximum(grown.sum((1, 2)), 1)
        cap = (tokens_left(structure) // num_rows)[:, None, None]
        length = jnp.where(grown, jnp.minimum(made["length"], cap), 0)
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
            node_value=value_of(at_nodes(world, request.nodes)),
            cost=cost,
        )
        return outcome, world

    return expand


def fold(bits, number):
    """A new number out of a number and another: the finaliser of MurmurHash3."""
    bits = bits + jnp.asarray(number).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def uniform(bits, number):
    """A number in [0, 1) out of two."""
    return (fold(bits, number) >> 8).astype(jnp.float32) / 2.0**24
