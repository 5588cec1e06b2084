"""Steps that go back to what a chain left before, held to what it left.

A chain says where it goes back to, and a small network that knows that it should may still spell a
mixture of two states that it left, as it copies out of its own text. The one idea: behind a first
token that goes back, a step goes on as one of these states was spelled before; which one, the
model says. Nothing but the chain's own text is asked (constrained decoding, as Hokamp and Liu 2017,
arXiv 1704.07138; pointers into the text, Vinyals et al. 2015, arXiv 1506.03134).
"""

import dataclasses

import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.inference.tried import mark_tokens, token_at
from rlm_jax.models.attention import MASKED_SCORE


@struct
class Copies:
    """X texts, one of which each of R rows spells again behind a token that `begins`.

    begins: the first tokens that go back. tokens: [R, X, S], token s stands at place s + 1 of the
    step. length: 0 where there is none. followed: the row may still spell the text, and behind its
    first token has begun to.
    """

    begins: Bool[Array, "V"]
    tokens: Int32[Array, "R X S"]
    length: Int32[Array, "R X"]
    followed: Bool[Array, "R X"]


def make_copies(
    begins: Bool[Array, "V"],
    marks: Bool[Array, "V"],
    tokens: Int32[Array, "R X S"],
    length: Int32[Array, "R X"],
) -> Copies:
    """The texts behind the last mark of each step.

    Args:
      marks: tokens behind which a step spells, to its end, what it left. tokens, length: the steps
        whose states a row may go back to, length 0 where there is none.
    """
    place = jnp.arange(tokens.shape[-1])
    inside = place < length[..., None]
    start = jnp.where(inside & marks[tokens], place + 1, 0).max(-1)
    length = jnp.where(start > 0, length - start, 0)
    shifted = jnp.minimum(start[..., None] + place, tokens.shape[-1] - 1)
    tokens = jnp.take_along_axis(tokens, shifted, -1)
    return Copies(begins, tokens, length, length > 0)


def hold_to_copies(
    logits: Float32[Array, "R V"], copies: Copies, index: Int32[Array, ""]
) -> Float32[Array, "R V"]:
    """Logits of token `index` of each row: of those that go back, what copies go on with alone.

    No step begins with a token that goes back where there is nothing to go back to.
    """
    token, follows = _at(copies, index)
    spelled = mark_tokens(token, follows, logits.shape[-1])
    # A row is free that spells none; so it is behind a text that did not end its step.
    held = follows.any(-1)[:, None]
    barred = jnp.where(index == 0, ~held & copies.begins, held & ~spelled)
    return jnp.where(barred, MASKED_SCORE, logits)


def follow_copies(copies: Copies, index: Int32[Array, ""], token: Int32[Array, "R"]) -> Copies:
    """Once token `index` is chosen: the texts that the rows still spell, none where they do not go
    back."""
    wanted, follows = _at(copies, index)
    goes_on = jnp.where(index == 0, copies.begins[token][:, None], wanted == token[:, None])
    return dataclasses.replace(copies, followed=follows & goes_on)


def _at(copies: Copies, index: Int32[Array, ""]) -> tuple[Array, Array]:
    """What each text says at place `index` of a step, and whether the row has spelled it so far."""
    place = jnp.maximum(index - 1, 0)
    return token_at(copies.tokens, copies.length, copies.followed, place)
