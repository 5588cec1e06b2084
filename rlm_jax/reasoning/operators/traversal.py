"""Traversal operators: which nodes to look at (Blueprint 4.3.2).

`select_child` is one step down a tree by a score; `select_answer` picks the solution a structure
answers with; `puct_score` is the score of the AlphaZero family.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import masked_argmax
from rlm_jax.core.types import Bool, Float32, Int32
from rlm_jax.reasoning.protocol import Answer
from rlm_jax.reasoning.structure import NO_NODE, Structure

AnswerRule = str  # one of ANSWER_RULES
ANSWER_RULES = ("majority", "weighted", "best")


def puct_score(
    value: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    prior: Float32[jax.Array, "*R K"],
    parent_visits: Float32[jax.Array, "*R"],
    *,
    exploration: float,
    base: float | None,
) -> Float32[jax.Array, "*R K"]:
    """Q + c(N_p) P sqrt(N_p) / (1 + N_c).

    Args:
      exploration: c. base: None gives the constant c (AlphaMath, golden G03); a number c_b makes
        it AlphaZero's c + log((N_p + c_b + 1) / c_b) (TS-LLM, golden G02).
    """
    factor = jnp.float32(exploration)
    if base is not None:
        factor = factor + jnp.log((parent_visits + base + 1.0) / base)
    bonus = factor * jnp.sqrt(parent_visits)
    return value + bonus[..., None] * prior / (1.0 + visits)


def select_answer(
    structure: Structure, answer_ids: Int32[jax.Array, "B N"], rule: AnswerRule
) -> Answer:
    """The solution to answer with, out of the finished ones; gold answers play no part.

    "majority" takes the answer most finished solutions give, "weighted" the one with the largest
    sum of values, "best" the finished solution of highest value. Ties go to the answer seen
    first, and the solution of highest value stands for its answer. Where nothing finished, the
    unfinished leaves compete; where no leaf states an answer, the leaf of highest value wins.

    Args:
      answer_ids: equal for nodes whose paths state the same answer, negative for no answer.
    """
    leaf = structure.alive & ~_has_child(structure)
    stated = leaf & (answer_ids >= 0)
    finished = stated & structure.terminal
    tiers = [finished, stated, leaf & structure.terminal, leaf]
    pool = leaf
    for tier in reversed(tiers):
        pool = jnp.where(tier.any(-1, keepdims=True), tier, pool)
    weight = jnp.where(pool, 1.0 if rule == "majority" else structure.value, 0.0)
    same = answer_ids[:, :, None] == answer_ids[:, None, :]
    same &= (answer_ids >= 0)[:, :, None]
    votes = jnp.where(same, weight[:, None, :], 0.0).sum(-1)
    if rule == "best":
        votes = structure.value
    else:
        # Paths without an answer cannot vote together: each stands for itself.
        votes = jnp.where(answer_ids >= 0, votes, structure.value)
    first, _ = masked_argmax(votes, pool)
    agree = pool & jnp.take_along_axis(same, first[:, None, None], 1)[:, 0]
    agree = jnp.where(agree.any(-1, keepdims=True), agree, _one_hot(first, pool))
    node, found = masked_argmax(structure.value, agree)
    score = jnp.take_along_axis(votes, first[:, None], 1)[:, 0]
    share = agree.sum(-1) / jnp.maximum(pool.sum(-1), 1)
    return Answer(jnp.where(found, node, NO_NODE), score, share.astype(jnp.float32))


def _has_child(structure: Structure) -> Bool[jax.Array, "B N"]:
    rows = jnp.arange(structure.depth.shape[0])[:, None, None]
    parents = jnp.where(structure.alive[..., None], structure.parents, -1)
    at = jnp.where(parents >= 0, parents, structure.capacity)
    counts = jnp.zeros_like(structure.depth).at[rows, at].add(1, mode="drop")
    return counts > 0


def _one_hot(index: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.arange(like.shape[-1])[None] == index[:, None]
