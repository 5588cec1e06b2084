"""Statistics over the entries a mask admits.

Losses and metrics keep sums and counts apart (`MaskedSum`), so that microbatches, devices and
hosts add up to exactly the number one large batch would have given; a mean is taken once, last.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Bool, Float, Shaped

Axis = int | tuple[int, ...] | None


@struct
class MaskedSum:
    """A sum and the weight behind it; add two of them field by field."""

    total: Float[jax.Array, "..."]
    count: Float[jax.Array, "..."]

    def mean(self) -> jax.Array:
        """total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


def masked_sum(
    values: Shaped[jax.Array, "..."], mask: Bool[jax.Array, "..."], axis: Axis = None
) -> MaskedSum:
    """Sum and count of `values` where `mask` holds; masked-out NaNs do not leak in."""
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    count = jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
    return MaskedSum(values.sum(axis), count.sum(axis))


def masked_mean(
    values: Shaped[jax.Array, "..."], mask: Bool[jax.Array, "..."], axis: Axis = None
) -> jax.Array:
    """Mean of `values` where `mask` holds, 0 where it holds nowhere."""
    return masked_sum(values, mask, axis).mean()


def masked_softmax(
    logits: Float[jax.Array, "... n"], mask: Bool[jax.Array, "... n"]
) -> Float[jax.Array, "... n"]:
    """Softmax over the last axis of the entries in `mask`; all zeros where there are none."""
    top = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def masked_argmax(
    values: Float[jax.Array, "... n"], mask: Bool[jax.Array, "... n"]
) -> tuple[jax.Array, jax.Array]:
    """Index of the largest admitted value (ties: the lowest index), and whether any is admitted."""
    # An admitted -inf must not lose to a masked entry in front of it.
    admitted = jnp.maximum(values, jnp.finfo(values.dtype).min)
    index = jnp.argmax(jnp.where(mask, admitted, -jnp.inf), axis=-1)
    return index.astype(jnp.int32), mask.any(-1)
