"""Steps that a decoder is held to: those that a task lists as legal.

A small network that knows which move it wants may still get its arithmetic wrong, and a search pays
for each such step and drops it. The one idea: where the rules of a task allow few steps, all of
them are spelled beforehand, and each token is one that some legal step goes on with; which one, the
model says. Probabilities are the model's own, renormalised over these tokens.

Papers: Hokamp and Liu 2017, arXiv 1704.07138; Scholak, Schucher and Bahdanau 2021 (PICARD), arXiv
2109.05093, where a parser refuses tokens as they are written.
"""

import dataclasses

import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.inference.tried import mark_tokens, token_at
from rlm_jax.models.attention import MASKED_SCORE


@struct
class Allowed:
    """M steps, one of which each of R rows writes.

    tokens: [R, M, S], without what ends a step. length: 0 where there is none. followed: the row
    has written the step's tokens so far. ends: the tokens that end a step. besides: the first
    tokens of steps that are not listed, and go on freely. bonus: added to the log-probability of
    each step; None adds nothing.
    """

    tokens: Int32[Array, "R M S"]
    length: Int32[Array, "R M"]
    followed: Bool[Array, "R M"]
    ends: Bool[Array, "V"]
    besides: Bool[Array, "V"]
    bonus: Float32[Array, "R M"] | None = None


def make_allowed(
    tokens: Int32[Array, "R M S"],
    length: Int32[Array, "R M"],
    ends: Bool[Array, "V"],
    besides: Bool[Array, "V"],
    bonus: Float32[Array, "R M"] | None = None,
) -> Allowed:
    """The steps before any token is written."""
    return Allowed(tokens, length, length > 0, ends, besides, bonus)


def hold_to_allowed(
    logits: Float32[Array, "R V"], allowed: Allowed, index: Int32[Array, ""]
) -> Float32[Array, "R V"]:
    """Logits of token `index` of each row: of what its steps go on with alone.

    A row that follows no step is free: of its state nothing is listed. A token's bonus is that of
    the best step that it leads to, and so a step's is its own once its last token is written.
    """
    token, follows = token_at(allowed.tokens, allowed.length, allowed.followed, index)
    goes_on = mark_tokens(token, follows, logits.shape[-1])
    whole = allowed.followed & (index == allowed.length) & (index > 0)
    ends = whole.any(-1)[:, None] & allowed.ends
    if allowed.bonus is not None:
        logits += _token_bonus(token, follows, whole, ends, allowed.bonus)
    goes_on |= ends | (index == 0) & allowed.besides
    held = (whole | follows).any(-1)[:, None]
    return jnp.where(held & ~goes_on, MASKED_SCORE, logits)


def _token_bonus(
    token: Int32[Array, "R M"],
    follows: Bool[Array, "R M"],
    whole: Bool[Array, "R M"],
    ends: Bool[Array, "R V"],
    bonus: Float32[Array, "R M"],
) -> Float32[Array, "R V"]:
    """The best bonus of what each token leads to, less the best of all; 0 of tokens of no step."""
    rows, size = jnp.arange(token.shape[0])[:, None], ends.shape[1]
    found = jnp.full(ends.shape, -jnp.inf).at[rows, jnp.where(follows, token, size)]
    found = found.max(jnp.where(follows, bonus, -jnp.inf), mode="drop")
    ended = jnp.where(whole, bonus, -jnp.inf).max(1, keepdims=True)
    found = jnp.where(ends, jnp.maximum(found, ended), found)
    return jnp.where(found > -jnp.inf, found - found.max(1, keepdims=True), 0.0)


def follow_allowed(allowed: Allowed, index: Int32[Array, ""], token: Int32[Array, "R"]) -> Allowed:
    """Once token `index` is chosen: the steps that the rows still follow."""
    wanted, follows = token_at(allowed.tokens, allowed.length, allowed.followed, index)
    return dataclasses.replace(allowed, followed=follows & (wanted == token[:, None]))
