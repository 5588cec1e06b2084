"""Attention over a context that lies in several places.

A row that decodes a step attends to its structure's prompt, to the steps between the root and the
node it grows from, and to its own tokens. The first two are shared (one prompt for all rows of a
structure, one path for all siblings), so each lies in memory once and is multiplied once with the
queries of all its rows. One softmax runs over the joined scores; keys and values are never joined.

What a query may see follows from positions alone: a valid key at a position no later than the
query's, and within the layer's window.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Int32
from rlm_jax.models.attention import MASKED_SCORE, scores_scale
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.transformer import Attend, softcap


@struct
class Context:
    """Keys and values that groups of rows share, for all layers.

    keys, values: one array per layer, a token's key a column and its value a row, as products
    with them run fastest; row r of R uses group r // (R / X). Of joined caches (`join_cache`, K =
    2E) there are values alone, and keys are None.
    positions, valid: of the C keys, [X, C].
    """

    keys: tuple[Float[Array, "X G E C"], ...] | None
    values: tuple[Float[Array, "X G C K"], ...]
    positions: Int32[Array, "X C"]
    valid: Bool[Array, "X C"]


class Part(NamedTuple):
    """One layer of a `Context`.

    Of a joined cache (keys are None) queries are zero where it has values, and of what is mixed the
    values count: half the product is for nothing, which TPU would pad with as much of nothing.
    """

    keys: Float[Array, "X G E C"] | None
    values: Float[Array, "X G C K"]
    positions: Int32[Array, "X C"]
    valid: Bool[Array, "X C"]


def join_cache(
    keys: Float[Array, "*rows E"], values: Float[Array, "*rows E"]
) -> Float[Array, "*rows K"]:
    """Keys and values side by side, as caches and pages hold them.

    TPU keeps rows of 128 numbers: of a head of 64, a key and a value fill one, where each would
    take one to itself.
    """
    return jnp.concatenate([keys, values], axis=-1)


def split_caches(
    caches: Sequence[Float[Array, "*rows K"]],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The keys and the values of joined caches, as a `Context` has them."""
    keys, values = zip(*(jnp.split(cache, 2, axis=-1) for cache in caches), strict=True)
    return tuple(key.swapaxes(-1, -2) for key in keys), values


def layer_parts(contexts: tuple[Context, ...], layer: int) -> list[Part]:
    """The contexts as this layer sees them."""
    return [
        Part(None if c.keys is None else c.keys[layer], c.values[layer], c.positions, c.valid)
        for c in contexts
    ]


def attend_parts(
    q: Float[Array, "R T H E"],
    positions: Int32[Array, "R T"],
    parts: list[Part],
    cfg: ModelConfig,
    layer: int,
) -> Float[Array, "R T H E"]:
    """Grouped-query attention of R rows over the joined keys of all parts."""
    rows, num_tokens, num_heads, width = q.shape
    num_groups = parts[0].values.shape[1]
    shape = (rows, num_tokens, num_groups, num_heads // num_groups)
    grouped = q.reshape(*shape, width)
    window = cfg.layer_window(layer)
    scores = [_scores(grouped, positions, part, cfg, window) for part in parts]
    top = jnp.max(jnp.stack([_by_row(s.max(-1)) for s in scores]), 0)
    weights = [jnp.exp(s - _by_group(top, s)[..., None]) for s in scores]
    norm = functools.reduce(jnp.add, [_by_row(w.sum(-1)) for w in weights])
    mixed = [_by_row(_mix(w, part))[..., -width:] for w, part in zip(weights, parts, strict=True)]
    out = functools.reduce(jnp.add, mixed) / norm[..., None]
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


class StepCache(NamedTuple):
    """One layer's keys and values of steps that are being decoded.

    Apart, keys are columns: XLA's CPU backend multiplies a row's few queries with them ten times
    as fast as with a joined cache. Joined (keys are None), TPU keeps them without padding.
    """

    keys: Float[Array, "R G E S"] | None
    values: Float[Array, "R G S K"]


def empty_step_cache(
    like: Float[Array, "R D"], cfg: ModelConfig, num_slots: int, *, apart: bool
) -> StepCache:
    """Room for S tokens a row; derived from `like`, to vary over a mesh as it does."""

    def room(*shape: int) -> Array:
        shape = (like.shape[0], cfg.num_kv_heads, *shape)
        return jnp.broadcast_to(like[:, :1, None, None] * 0, shape)

    if apart:
        return StepCache(room(cfg.head_dim, num_slots), room(num_slots, cfg.head_dim))
    return StepCache(None, room(num_slots, 2 * cfg.head_dim))


def join_step_cache(cache: StepCache) -> Float[Array, "R G S K"]:
    """The cache as pages hold it (`join_cache`)."""
    if cache.keys is None:
        return cache.values
    return join_cache(cache.keys.swapaxes(-1, -2), cache.values)


def make_decode_attend(
    cfg: ModelConfig,
    contexts: tuple[Context, ...],
    positions: Int32[Array, "R S"],
    index: Int32[Array, ""],
) -> Attend:
    """Attention of one new token per row, the `index`-th of its step.

    The state is the step's own `StepCache` of each layer; the new token's key and value are written
    at `index`, the same for all rows.
    """
    now = jax.lax.dynamic_slice_in_dim(positions, index, 1, axis=1)
    valid = jnp.ones_like(positions, bool)

    def attend(layer, q, k, v, state):
        old = state[layer]
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index)
        if old.keys is None:
            new = join_cache(k, v).transpose(0, 2, 1, 3)
            cache = StepCache(None, update(old.values, new, axis=2))
        else:
            keys = update(old.keys, k.transpose(0, 2, 3, 1), axis=3)
            cache = StepCache(keys, update(old.values, v.transpose(0, 2, 1, 3), axis=2))
        parts = [*layer_parts(contexts, layer), Part(*cache, positions, valid)]
        out = attend_parts(q, now, parts, cfg, layer)
        return out, (*state[:layer], cache, *state[layer + 1 :])

    return attend


def make_extend_attend(
    cfg: ModelConfig,
    contexts: tuple[Context, ...],
    positions: Int32[Array, "R T"],
    valid: Bool[Array, "R T"],
) -> Attend:
    """Attention of T given tokens per row over the contexts and over each other.

    The state collects joined caches, per layer [R, G, T, 2E], for whoever keeps them.
    """

    def attend(layer, q, k, v, state):
        cache = join_cache(k, v).transpose(0, 2, 1, 3)
        own = Part(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), positions, valid)
        out = attend_parts(q, positions, [*layer_parts(contexts, layer), own], cfg, layer)
        return out, (*state, cache)

    return attend


def _scores(grouped, positions, part, cfg, window):
    """Masked scores [X, G, R/X, T, M, C] of every row over one part's keys."""
    rows, num_tokens, num_groups, heads, width = grouped.shape
    num_shared = part.values.shape[0]
    each = rows // num_shared
    # All rows of one group become rows of one product with its keys.
    q = grouped.reshape(num_shared, each, num_tokens, num_groups, heads, width)
    q = q.transpose(0, 3, 1, 2, 4, 5).reshape(num_shared, num_groups, -1, width)
    if part.keys is None:
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, part.values.shape[-1] - width)])
        scores = jnp.einsum("xgqe,xgce->xgqc", q, part.values, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("xgqe,xgec->xgqc", q, part.keys, preferred_element_type=jnp.float32)
    scores = softcap(scores * scores_scale(cfg), cfg.attn_softcap)
    scores = scores.reshape(num_shared, num_groups, each, num_tokens, heads, -1)
    age = positions.reshape(num_shared, each, num_tokens, 1) - part.positions[:, None, None, :]
    seen = part.valid[:, None, None, :] & (age >= 0)
    if window is not None:
        seen &= age < window
    return jnp.where(seen[:, None, :, :, None, :], scores, MASKED_SCORE)


def _mix(weights, part):
    """Values of one part mixed by unnormalised weights [X, G, R/X, T, M, C]."""
    num_shared, num_groups, *_, length = weights.shape
    mixed = jnp.einsum(
        "xgqc,xgce->xgqe",
        weights.reshape(num_shared, num_groups, -1, length).astype(part.values.dtype),
        part.values,
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(*weights.shape[:-1], -1)


def _by_row(array: Array) -> Array:
    """[X, G, R/X, T, M, ...] as [R, G, T, M, ...]: what little leaves a part's own layout."""
    array = array.swapaxes(1, 2)
    return array.reshape(-1, *array.shape[2:])


def _by_group(array: Array, like: Array) -> Array:
    """[R, G, T, M] in the layout of `like`, [X, G, R/X, T, M, C]."""
    num_shared, _, each = like.shape[:3]
    return array.reshape(num_shared, each, *array.shape[1:]).swapaxes(1, 2)
