"""Forwarding given tokens: prompts into pages, suffixes on top of a context, plain scoring."""

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float, Float32, Int32
from rlm_jax.inference.attention import Context, make_extend_attend
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params
from rlm_jax.models.transformer import forward, unembed

# Logits of this many positions are in memory at once when a text is scored.
_SCORE_CHUNK = 64


@struct
class Extension:
    """What forwarding T given tokens left behind.

    hidden: after the final norm. caches: keys and values, per layer (`attention.join_cache`).
    """

    hidden: Float[Array, "R T D"]
    caches: tuple[Float[Array, "R G T K"], ...]


@struct
class Scores:
    """Log-probability of each token given those before it; the first has none (0).

    top_logprobs, top_ids: the likeliest tokens at each place, best first.
    """

    logprobs: Float32[Array, "R T"]
    top_logprobs: Float32[Array, "R T A"]
    top_ids: Int32[Array, "R T A"]
    hidden: Float[Array, "R T D"]


def extend(
    params: Params,
    tokens: Int32[Array, "R T"],
    lengths: Int32[Array, "R"],
    *,
    cfg: ModelConfig,
    contexts: tuple[Context, ...] = (),
    starts: Int32[Array, "R"] | None = None,
) -> Extension:
    """Forwards right-padded `tokens` behind their contexts, causally among themselves.

    Args:
      lengths: real tokens of each row. starts: position of each row's first token (default 0).
    """
    offset = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    valid = offset < lengths[:, None]
    positions = offset + (jnp.zeros_like(lengths) if starts is None else starts)[:, None]
    attend = make_extend_attend(cfg, contexts, positions, valid)
    hidden, caches = forward(params, tokens, positions, cfg=cfg, attend=attend, state=())
    return Extension(hidden, caches)


def last_hidden(hidden: Float[Array, "R T D"], lengths: Int32[Array, "R"]) -> Float[Array, "R D"]:
    """The hidden state of each row's last real token."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, 1)[:, 0]


def score_tokens(
    params: Params,
    tokens: Int32[Array, "R T"],
    lengths: Int32[Array, "R"],
    *,
    cfg: ModelConfig,
    num_top: int = 5,
) -> Scores:
    """Scores whole texts; the logits of the full text are never in memory at once."""
    hidden = extend(params, tokens, lengths, cfg=cfg).hidden
    rows, num_tokens = tokens.shape
    chunk = min(_SCORE_CHUNK, num_tokens)
    pad = -num_tokens % chunk
    # Position t predicts token t + 1; what the last one would predict is not asked for.
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, pad + 1)))
    padded = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))

    def score_chunk(inputs):
        states, wanted = inputs
        logprobs = jax.nn.log_softmax(unembed(params, states, cfg=cfg), -1)
        top, ids = jax.lax.top_k(logprobs, num_top)
        return jnp.take_along_axis(logprobs, wanted[..., None], -1)[..., 0], top, ids

    def split(array):
        return jnp.moveaxis(array.reshape(rows, -1, chunk, *array.shape[2:]), 1, 0)

    def join(array):
        whole = jnp.moveaxis(array, 0, 1).reshape(rows, -1, *array.shape[3:])[:, : num_tokens - 1]
        before = jnp.zeros_like(whole[:, :1])
        return jnp.concatenate([before, whole], 1)

    chosen, top, ids = jax.lax.map(score_chunk, (split(padded), split(targets)))
    return Scores(join(chosen), join(top), join(ids), hidden)


def yes_probability(
    params: Params,
    hidden: Float[Array, "R D"],
    yes_ids: Int32[Array, "Y"],
    no_ids: Int32[Array, "Z"],
    *,
    cfg: ModelConfig,
) -> Float32[Array, "R"]:
    """P(next token says yes) / P(it says yes or no), from the state in front of that token."""
    logits = unembed(params, hidden, cfg=cfg)
    yes = jax.nn.logsumexp(logits[:, yes_ids], -1)
    no = jax.nn.logsumexp(logits[:, no_ids], -1)
    return jax.nn.sigmoid(yes - no)
