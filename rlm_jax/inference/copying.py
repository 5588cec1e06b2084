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
from rlm_jax.models.attention import MASKED_SCORE


@struct
class Copies:
    """X texts, one of which each of R rows spells again behind a token that `begins`.

    begins: the first tokens that go back. tokens: [R, X, S], token s stands at place s + 1 of the
    step. length: 0 where there is none. followed: the row has spelled the text so far. bound: the
    row's step goes back.
    """

    begins: Bool[Array, "V"]
    tokens: Int32[Array, "R X S"]
    length: Int32[Array, "R X"]
    followed: Bool[Array, "R X"]
    bound: Bool[Array, "R"]


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
    none = length[:, 0] < 0
    return Copies(begins, tokens, length, length > 0, none)


def hold_to_copies(
    logits: Float32[Array, "R V"], copies: Copies, index: Int32[Array, ""]
) -> Float32[Array, "R V"]:
    """Logits of token `index` of each row: of those that go back, what copies go on with alone.

    No step begins with a token that goes back where there is nothing to go back to.
    """
    lost = ~(copies.length > 0).any(-1)
    begun = jnp.where(lost[:, None] & copies.begins, MASKED_SCORE, logits)
    token, follows = _at(copies, index)
    rows = jnp.arange(logits.shape[0])[:, None]
    allowed = jnp.zeros(logits.shape, bool)
    allowed = allowed.at[rows, jnp.where(follows, token, logits.shape[-1])].set(True, mode="drop")
    # Behind a text that did not end its step a row is free again.
    bound = copies.bound & follows.any(-1)
    held = jnp.where(bound[:, None] & ~allowed, MASKED_SCORE, logits)
    return jnp.where(index == 0, begun, held)


def follow_copies(copies: Copies, index: Int32[Array, ""], token: Int32[Array, "R"]) -> Copies:
    """Once token `index` is chosen: which rows go back, and the texts that they still spell."""
    wanted, follows = _at(copies, index)
    first = index == 0
    return dataclasses.replace(
        copies,
        bound=jnp.where(first, copies.begins[token], copies.bound),
        followed=jnp.where(first, copies.followed, follows & (wanted == token[:, None])),
    )


def _at(copies: Copies, index: Int32[Array, ""]) -> tuple[Array, Array]:
    """What each text says at place `index` of a step, and whether the row has spelled it so far."""
    place = jnp.maximum(index - 1, 0)
    return copies.tokens[:, :, place], copies.followed & (place < copies.length)
