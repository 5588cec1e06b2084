"""Token losses: cross-entropy with one label or several a position, and what goes with it.

One idea: every loss is a weighted sum and the weight behind it (`MaskedSum`), never a mean, so
microbatches, devices and hosts add up to exactly the loss of one large batch; the caller divides
once, last. A completion mask, a padding mask and the weight of an example are one array of
`weights` here: 0 leaves a position out, whatever stands there.

Several labels a position are Rao-Blackwellised supervised fine-tuning: where a solver knows all
right next tokens and their probabilities, the expected cross-entropy over them replaces that of one
sampled chain. Spec B4, C2.1 (Algorithm 2 of arXiv 2501.11223; its mean over sequences is the
caller's choice of weights).
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.types import Array, Float, Float32, Int32, Shaped


def weighted_sum(values: Shaped[Array, "..."], weights: Shaped[Array, "..."]) -> MaskedSum:
    """sum w x and sum w over all entries; where w is 0, x plays no part (NaN included).

    Args:
      weights: a mask or numbers >= 0, of the shape of `values` or broadcast to it.
    """
    weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    values = jnp.where(weights != 0, values.astype(jnp.float32), 0.0)
    return MaskedSum((weights * values).sum(), weights.sum())


def token_logprobs(
    logits: Float[Array, "*rows V"], tokens: Int32[Array, "*rows"]
) -> Float32[Array, "*rows"]:
    """log p(token) at every position, in float32."""
    return _pick_logprobs(logits, tokens[..., None])[..., 0]


def cross_entropy(
    logits: Float[Array, "*rows V"],
    targets: Int32[Array, "*rows"],
    weights: Shaped[Array, "*rows"],
) -> MaskedSum:
    """-log p(target), weighted.

    Args:
      targets: token ids; any id in range where the weight is 0.
      weights: the completion mask, or a weight a token: 1 for each token of a step times the step's
        weight gives weighted fine-tuning on steps (see `distillation.py`).
    """
    return weighted_sum(-token_logprobs(logits, targets), weights)


def soft_cross_entropy(
    logits: Float[Array, "*rows V"],
    ids: Int32[Array, "*rows M"],
    weights: Float[Array, "*rows M"],
) -> MaskedSum:
    """-sum_m w_m log p(id_m): cross-entropy with up to M weighted labels a position.

    Args:
      weights: sum to one over a position's labels, or are all 0 where it is left out (they may sum
        to a position's weight as well: the count is their sum). An unused label has weight 0 and
        any id in range; an id that stands twice counts with both weights.
    """
    return weighted_sum(-_pick_logprobs(logits, ids), weights)


def label_entropy(
    weights: Float[Array, "*rows M"], scale: Shaped[Array, "*rows"] | float = 1.0
) -> MaskedSum:
    """-sum_m w_m log w_m of the labels of `soft_cross_entropy`, whose least possible value it is:
    their difference is KL(labels || model). Labels must be distinct, their weights sum to one.

    Args:
      scale: what each position counts for, as in `soft_cross_entropy` of `weights * scale`.
    """
    logs = jnp.log(jnp.where(weights > 0, weights.astype(jnp.float32), 1.0))
    return weighted_sum(-logs, weights * jnp.asarray(scale)[..., None])


def z_penalty(logits: Float[Array, "*rows V"], weights: Shaped[Array, "*rows"]) -> MaskedSum:
    """(log sum exp)^2, weighted: keeps logits near normalised (PaLM, arXiv 2204.02311: 1e-4)."""
    return weighted_sum(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2, weights)


def token_accuracy(
    logits: Float[Array, "*rows V"],
    targets: Int32[Array, "*rows"],
    weights: Shaped[Array, "*rows"],
) -> MaskedSum:
    """Whether the most probable token is the target, weighted (a metric, without gradient)."""
    return weighted_sum(logits.argmax(-1) == targets, weights)


def _pick_logprobs(logits: Array, ids: Array) -> Array:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, ids, axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
