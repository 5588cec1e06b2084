"""Steps that a decoder is not to write again: decoding without replacement along a path.

A chain that goes back to a state and decodes greedily writes the step that it just took back. The
one idea: what was written has had its chance. Of the probability of each next token that goes on in
a tried step, the share that leads to the rest of this step is taken away; at the step's last token
nothing is left. So the next step is drawn, or the likeliest token taken, from the model's own
distribution without the steps that were tried, and no step twice.

Paper: Shi, Bieber and Sutton 2020, Incremental Sampling Without Replacement for Sequence Models
(arXiv 2002.09067). Deviation: a step's probability is what it was when it was written; from the
same state, but with less behind it.
"""

import dataclasses

import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32

# Less than rounding lets stand of a token that is taken away whole.
_NOTHING = 1e-6


@struct
class Tried:
    """X steps that each of R rows is not to write.

    tokens: [R, X, S]. length: 0 where there is none. rest: the probability of what follows token s
    in its step, given the tokens up to it. followed: the row has written the step's tokens so far.
    """

    tokens: Int32[Array, "R X S"]
    length: Int32[Array, "R X"]
    rest: Float32[Array, "R X S"]
    followed: Bool[Array, "R X"]


def make_tried(
    tokens: Int32[Array, "R X S"], length: Int32[Array, "R X"], logprobs: Float32[Array, "R X S"]
) -> Tried:
    """Steps, equal ones once, and the log-probabilities that their tokens were written with."""
    inside = jnp.arange(tokens.shape[-1]) < length[..., None]
    # What several siblings wrote is taken away once.
    plain = jnp.where(inside, tokens, -1)
    same = (plain[:, :, None] == plain[:, None]).all(-1)
    before = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    length = jnp.where((same & before).any(-1), 0, length)
    inside &= (length > 0)[..., None]
    logprobs = jnp.where(inside, logprobs, 0.0)
    behind = jnp.cumsum(logprobs[..., ::-1], -1)[..., ::-1] - logprobs
    return Tried(tokens, length, jnp.exp(behind), length > 0)


def take_away(
    logits: Float32[Array, "R V"], tried: Tried, index: Int32[Array, ""]
) -> Float32[Array, "R V"]:
    """Logits of token `index` of each row, without the probability of the steps it follows."""
    token, follows = token_at(tried.tokens, tried.length, tried.followed, index)
    # Steps that go on with the same token take from it together.
    together = follows[:, None, :] & (token[:, None, :] == token[:, :, None])
    gone = jnp.where(together, tried.rest[:, None, :, index], 0.0).sum(-1)
    left = jnp.where(gone < 1 - _NOTHING, jnp.log1p(-jnp.minimum(gone, 1 - _NOTHING)), -jnp.inf)
    at = jnp.where(follows, token, logits.shape[-1])
    rows = jnp.arange(logits.shape[0])[:, None]
    changed = jnp.take_along_axis(logits, token, 1) + left
    return logits.at[rows, at].set(changed, mode="drop")


def follow_tried(tried: Tried, index: Int32[Array, ""], token: Int32[Array, "R"]) -> Tried:
    """Once token `index` is chosen: the steps that the rows still follow."""
    wanted, follows = token_at(tried.tokens, tried.length, tried.followed, index)
    return dataclasses.replace(tried, followed=follows & (wanted == token[:, None]))


def token_at(
    tokens: Int32[Array, "R X S"],
    length: Int32[Array, "R X"],
    followed: Bool[Array, "R X"],
    index: Int32[Array, ""],
) -> tuple[Int32[Array, "R X"], Bool[Array, "R X"]]:
    """Token `index` of X texts of each row, and whether the row has followed the text to there."""
    return tokens[:, :, index], followed & (index < length)


def mark_tokens(
    token: Int32[Array, "R X"], follows: Bool[Array, "R X"], num_tokens: int
) -> Bool[Array, "R V"]:
    """The tokens that the texts which a row follows go on with, of V."""
    rows = jnp.arange(token.shape[0])[:, None]
    marked = jnp.zeros((token.shape[0], num_tokens), bool)
    return marked.at[rows, jnp.where(follows, token, num_tokens)].set(True, mode="drop")
