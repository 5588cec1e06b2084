"""What a problem has cost so far: the one counter every path to a network passes.

Strategies are compared at equal budgets, never at equal iterations: a token of a step that was
sampled counts whether or not the step was used in the end, and padding never counts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Int32


@struct
class Budget:
    """Counters per problem, exact and independent of the machine.

    generated_tokens: tokens sampled from the policy, in rollouts too. What a search may spend.
    forwarded_tokens: tokens that went through the policy to that end, those of displaced beams
        among them. The same number, or a smaller one where steps by beams share tokens: a beam is
        displaced by one that shares its first tokens with another.
    prefilled_tokens: tokens of a prompt or context forwarded once to build its KV cache.
    scored_tokens: given tokens forwarded by an evaluator (self-evaluation prompts, reward models).
    model_calls: network calls that took part in this problem; a batched call counts once for each
        problem in it. Decoding one token is one call.
    verifier_calls: calls of a task's verifier during the search.
    expansions: nodes that were expanded.
    rollout_tokens: those of the generated tokens that no node keeps: they finished a path to see
        what comes of it.
    """

    generated_tokens: Int32[jax.Array, "*B"]
    forwarded_tokens: Int32[jax.Array, "*B"]
    prefilled_tokens: Int32[jax.Array, "*B"]
    scored_tokens: Int32[jax.Array, "*B"]
    model_calls: Int32[jax.Array, "*B"]
    verifier_calls: Int32[jax.Array, "*B"]
    expansions: Int32[jax.Array, "*B"]
    rollout_tokens: Int32[jax.Array, "*B"]


def zero_budget(like: jax.Array) -> Budget:
    """A budget of nothing, with the shape of `like` [B] (and its sharding, inside shard_map)."""
    zero = jnp.zeros_like(like, dtype=jnp.int32)
    return Budget(**{field.name: zero for field in dataclasses.fields(Budget)})


def add_budgets(first: Budget, second: Budget) -> Budget:
    """Both costs together, counter by counter."""
    return jax.tree.map(jnp.add, first, second)
