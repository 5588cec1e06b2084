"""Dense attention with grouped queries, causal: the reference that every cache must equal.

Keys and values are never repeated: H query heads are viewed as G groups of H/G, and one einsum
serves each group. Scores and softmax are float32. Queries are taken in blocks, and a block looks at
no key behind its last query: half of all scores would be thrown away.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Bool, Float, Float32, Int32
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.transformer import Attend, softcap

# Finite, so that a row whose keys are all masked gives a uniform softmax and not NaN.
MASKED_SCORE = -1e30
# The more blocks, the nearer to half of the scores (8: 9/16), and the more to compile.
_MOST_BLOCKS = 8
_LEAST_QUERIES = 32


def scores_scale(cfg: ModelConfig) -> float:
    """What the products of queries and keys are multiplied by."""
    return 1.0 / math.sqrt(cfg.attn_scale or cfg.head_dim)


def attention_scores(
    q: Float[Array, "R T H E"], k: Float[Array, "R S G E"], cfg: ModelConfig
) -> Float32[Array, "R G M T S"]:
    """Scaled, soft-capped, unmasked scores; query head h = g * M + m uses key head g."""
    rows, num_tokens, _, width = q.shape
    grouped = q.reshape(rows, num_tokens, k.shape[2], -1, width)
    scores = jnp.einsum("rtgme,rsge->rgmts", grouped, k, preferred_element_type=jnp.float32)
    return softcap(scores * scores_scale(cfg), cfg.attn_softcap)


def attention_mix(
    weights: Float32[Array, "R G M T S"], v: Float[Array, "R S G E"]
) -> Float[Array, "R T H E"]:
    """The values' mixture under attention weights, in the dtype of `v`."""
    out = jnp.einsum(
        "rgmts,rsge->rtgme", weights.astype(v.dtype), v, preferred_element_type=v.dtype
    )
    return out.reshape(*out.shape[:2], -1, v.shape[-1])


def make_dense_attend(
    cfg: ModelConfig,
    *,
    key_mask: Bool[Array, "R T"] | None = None,
    segment_ids: Int32[Array, "R T"] | None = None,
) -> Attend:
    """Causal attention over the tokens of the call itself; its state is passed through untouched.

    Args:
      cfg: the model; gives score scale, soft cap and each layer's window.
      key_mask: False at padding, which no token attends to (the padding's own rows are garbage).
      segment_ids: for packed rows; tokens see only tokens of their own segment.
    """

    def attend(layer: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        num_tokens, window = q.shape[1], cfg.layer_window(layer)
        size = max(_LEAST_QUERIES, -(-num_tokens // _MOST_BLOCKS))
        mixed = []
        for start in range(0, num_tokens, size):
            stop = min(start + size, num_tokens)
            queries = slice(start, stop)
            keys = slice(0 if window is None else max(0, start + 1 - window), stop)
            ages = jnp.arange(start, stop)[:, None] - jnp.arange(keys.start, stop)
            allowed = ((ages >= 0) if window is None else (ages >= 0) & (ages < window))[None]
            if key_mask is not None:
                allowed = allowed & key_mask[:, None, keys]
            if segment_ids is not None:
                allowed = allowed & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
            scores = attention_scores(q[:, queries], k[:, keys], cfg)
            scores = jnp.where(allowed[:, None, None], scores, MASKED_SCORE)
            mixed.append(attention_mix(jax.nn.softmax(scores, axis=-1), v[:, keys]))
        return jnp.concatenate(mixed, axis=1), state

    return attend


def make_set_attend(
    cfg: ModelConfig, present: Bool[Array, "R T"], asks: Bool[Array, "T"]
) -> Attend:
    """Attention over a set: every token sees all that are present, those behind it too.

    Args:
      asks: tokens that no other token sees, so that each of them finds what it would find alone.
    """
    itself = jnp.eye(asks.shape[0], dtype=bool)
    seen = present[:, None] & (~asks | itself)

    def attend(layer: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        del layer
        scores = attention_scores(q, k, cfg)
        scores = jnp.where(seen[:, None, None], scores, MASKED_SCORE)
        return attention_mix(jax.nn.softmax(scores, axis=-1), v), state

    return attend
