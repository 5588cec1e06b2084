"""Evaluate operators: from statistics of a step or a solution to a value (Blueprint 4.3.4).

Pure functions of what a search holds already: the policy's prior over sampled steps, a solution's
score from the scores of its steps, the share of finished solutions that agree
(self-consistency, as rStar's terminal reward, arXiv 2408.06195), the Monte-Carlo value of a state
from its rollouts, and mixtures of several values. What needs the network (token confidence,
self-evaluation, value heads, rollouts themselves) comes from the expander, `language.py`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import masked_softmax
from rlm_jax.core.types import Bool, Float32, Int32, UInt32

Rule = str  # one of AGGREGATIONS
AGGREGATIONS = ("min", "prod", "last", "mean", "max")
MIXTURES = ("mean", "geometric")


# What is certain has odds all the same.
LEAST_CHANCE = 1e-6


def log_odds(chances: Float32[jax.Array, "*R"]) -> Float32[jax.Array, "*R"]:
    """The logarithm of the odds of each chance, which counts as within 1e-6 of neither 0 nor 1."""
    return jax.scipy.special.logit(jnp.clip(chances, LEAST_CHANCE, 1 - LEAST_CHANCE))


def step_prior(
    logprob: Float32[jax.Array, "*R K"],
    length: Int32[jax.Array, "*R K"],
    valid: Bool[jax.Array, "*R K"],
    *,
    length_power: float = 1.0,
    normalise: bool = True,
) -> Float32[jax.Array, "*R K"]:
    """The policy's prior over K sampled steps: exp(logprob / length^power).

    Power 1 is AlphaMath's exp(mean token log-prob), 1.25 MCTS-DPO's. Normalised, it sums to one
    over the valid siblings (TS-LLM); not normalised, it is the value itself.
    """
    score = logprob / jnp.maximum(length, 1).astype(jnp.float32) ** length_power
    if normalise:
        return masked_softmax(score, valid)
    return jnp.where(valid, jnp.exp(score), 0.0)


def sibling_prior(
    nodes: Int32[jax.Array, "B W"],
    logprob: Float32[jax.Array, "B W K"],
    length: Int32[jax.Array, "B W K"],
    valid: Bool[jax.Array, "B W K"],
    **settings: Any,
) -> Float32[jax.Array, "B W K"]:
    """`step_prior` of the steps from each node; those from the root are siblings in any lane."""
    shape = logprob.shape
    at_root = (nodes == 0)[..., None]

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(shape[0], -1)

    own = step_prior(logprob, length, valid, **settings)
    wide = step_prior(flat(logprob), flat(length), flat(valid & at_root), **settings)
    return jnp.where(at_root, wide.reshape(shape), own)


def mix_noise(
    prior: Float32[jax.Array, "B W K"],
    noise: Float32[jax.Array, "B R"],
    among: Bool[jax.Array, "B W K"],
    weight: float,
) -> Float32[jax.Array, "B W K"]:
    """(1 - weight) P + weight noise for the children `among` whom it is spread, as at AlphaZero's
    root.

    Args:
      noise: R shares, for the children in their order; rounds too narrow for all R of them are
        not the root's, and need none.
    """
    noise = noise[:, : prior[0].size]
    spare = prior[0].size - noise.shape[1]
    noise = jnp.pad(noise, ((0, 0), (0, spare))).reshape(prior.shape)
    noise = jnp.where(among, noise, 0.0)
    noise /= jnp.maximum(noise.sum((1, 2), keepdims=True), 1e-30)
    return jnp.where(among, (1.0 - weight) * prior + weight * noise, prior)


def accumulate_score(
    above: Float32[jax.Array, "*R"],
    score: Float32[jax.Array, "*R"],
    depth: Int32[jax.Array, "*R"],
    rule: Rule,
) -> Float32[jax.Array, "*R"]:
    """A path's score from its parent's and that of its newest step (spec C3.2, golden G23).

    Args:
      above: the parent's accumulated score; not read at depth 1. depth: steps of the path, >= 1.

    Raises:
      ValueError: `rule` is not one of min, prod, last, mean, max.
    """
    rules = {
        "min": lambda: jnp.minimum(above, score),
        "prod": lambda: above * score,
        "last": lambda: score,
        "mean": lambda: above + (score - above) / depth,
        "max": lambda: jnp.maximum(above, score),
    }
    if rule not in rules:
        raise ValueError(f"aggregation rule {rule!r}: accepted are {AGGREGATIONS}")
    return jnp.where(depth <= 1, score, rules[rule]())


def self_consistency(
    answers: UInt32[jax.Array, "B M"],
    votes: UInt32[jax.Array, "B V"],
    voters: Bool[jax.Array, "B V"],
) -> Float32[jax.Array, "B M"]:
    """Share of a structure's finished solutions that state the same answer.

    Args:
      answers: keys to look up, 0 for none. votes: keys of the solutions; voters: which of them
        are finished. A solution that states nothing votes for nothing and still counts.
    """
    same = (answers[:, :, None] == votes[:, None, :]) & (answers != 0)[:, :, None]
    count = jnp.maximum(voters.sum(-1, keepdims=True), 1)
    return (same & voters[:, None, :]).sum(-1).astype(jnp.float32) / count


def average_rollouts(
    rewards: Float32[jax.Array, "*R M"],
    num_steps: Int32[jax.Array, "*R M"],
    made: Bool[jax.Array, "*R M"],
    *,
    discount: float,
) -> Float32[jax.Array, "*R"]:
    """The mean of discount^steps * reward over a state's rollouts (spec B4, golden G08).

    Args:
      rewards: what each rollout ended with. num_steps: steps it took from the state to its end.
        made: rollouts that count; a state without any is worth 0.
    """
    returns = jnp.where(made, jnp.float32(discount) ** num_steps * rewards, 0.0)
    return returns.sum(-1) / jnp.maximum(made.sum(-1), 1)


def mix_values(
    values: Sequence[Float32[jax.Array, "*R"]], weights: Sequence[float], rule: str = "mean"
) -> Float32[jax.Array, "*R"]:
    """One value out of several estimates of it, by weights that need not sum to 1.

    "mean" is sum w v / sum w (AlphaGo's and AlphaMath's (1 - l) V + l rollout); "geometric" is
    prod v^(w / sum w) (RAP's u^a c^(1-a)), where a value below 0 counts as 0.

    Raises:
      ValueError: `rule` is neither.
    """
    total = float(sum(weights))
    shares = [weight / total for weight in weights]
    if rule == "mean":
        return jnp.tensordot(jnp.asarray(shares), jnp.stack(values), 1)
    if rule == "geometric":
        powers = jnp.reshape(jnp.asarray(shares), (-1, *(1 for _ in values[0].shape)))
        return (jnp.maximum(jnp.stack(values), 0.0) ** powers).prod(0)
    raise ValueError(f"mixture {rule!r}: accepted are {MIXTURES}")
