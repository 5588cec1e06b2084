"""Evaluate operators: from statistics of a step or a solution to a value (Blueprint 4.3.4).

Pure functions of what a search holds already: the policy's prior over sampled steps, a solution's
score from the scores of its steps, and the share of finished solutions that agree
(self-consistency, as rStar's terminal reward, arXiv 2408.06195). What needs the network (token
confidence, self-evaluation, value heads) comes from the expander, `language.py`.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import masked_softmax
from rlm_jax.core.types import Bool, Float32, Int32
from rlm_jax.reasoning.structure import Structure

Rule = str


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


def aggregate_steps(
    scores: Float32[jax.Array, "*R T"], mask: Bool[jax.Array, "*R T"], rule: Rule
) -> Float32[jax.Array, "*R"]:
    """One score for a solution from the scores of its steps; -1 where it has none (OpenR).

    Raises:
      ValueError: `rule` is not one of min, prod, last, mean, max.
    """
    steps = jnp.arange(scores.shape[-1])
    final = jnp.max(jnp.where(mask, steps, -1), -1)
    rules = {
        "min": lambda: jnp.min(jnp.where(mask, scores, jnp.inf), -1),
        "prod": lambda: jnp.prod(jnp.where(mask, scores, 1.0), -1),
        "last": lambda: jnp.take_along_axis(scores, jnp.maximum(final, 0)[..., None], -1)[..., 0],
        "mean": lambda: jnp.where(mask, scores, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1),
        "max": lambda: jnp.max(jnp.where(mask, scores, -jnp.inf), -1),
    }
    if rule not in rules:
        raise ValueError(f"aggregation rule {rule!r}: accepted are {sorted(rules)}")
    return jnp.where(mask.any(-1), rules[rule](), -1.0)


def self_consistency(
    structure: Structure, answer_ids: Int32[jax.Array, "B N"]
) -> Float32[jax.Array, "B N"]:
    """Share of a structure's finished solutions that give the same answer as this one.

    `answer_ids` are equal for equal answers, negative for none; a node that is not terminal, or
    states no answer, gets 0.
    """
    voter = structure.terminal & structure.alive & (answer_ids >= 0)
    same = (answer_ids[:, :, None] == answer_ids[:, None, :]) & voter[:, None, :]
    share = same.sum(-1) / jnp.maximum(voter.sum(-1, keepdims=True), 1)
    return jnp.where(voter, share, 0.0).astype(jnp.float32)
