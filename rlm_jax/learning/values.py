"""Value losses: predictions or logits of a value head against targets, as weighted sums.

  MSE        on bounded predictions, the x1 Q-model's loss (spec B5 Algorithm 7, golden G43)
  BCE        on logits, for values that are probabilities of success (A3 design i, golden G20)
  HL-Gauss   on the logits of a histogram: the target becomes a Gaussian over the bins and the loss
             is cross-entropy (Farebrother et al. 2024, "Stop Regressing", arXiv 2403.03950); its
             gradients do not grow with the error, and a mean of outcomes need not be near any of
             them

Targets may be soft in all three: a mean over rollouts or a backed-up value is a target like any
other. HL-Gauss deviates from the paper in its support: bins reach beyond the values' range
(`models/histogram.py`), or the truncated Gaussian of a target at the edge, where sparse rewards put
most of them, would read out as something inside.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.types import Array, Float, Float32, Shaped
from rlm_jax.learning.losses import weighted_sum
from rlm_jax.models.histogram import Histogram, bin_edges


def value_mse(
    predictions: Float[Array, "*rows"],
    targets: Float[Array, "*rows"],
    weights: Shaped[Array, "*rows"],
) -> MaskedSum:
    """(prediction - target)^2, weighted; no factor of one half."""
    return weighted_sum((_admit(predictions, weights) - _admit(targets, weights)) ** 2, weights)


def value_bce(
    logits: Float[Array, "*rows"],
    targets: Float[Array, "*rows"],
    weights: Shaped[Array, "*rows"],
) -> MaskedSum:
    """-t log sigmoid(x) - (1 - t) log sigmoid(-x), weighted.

    Args:
      logits: of success, before the sigmoid. targets: probabilities, hard or soft, in [0, 1].
    """
    x, t = _admit(logits, weights), _admit(targets, weights)
    return weighted_sum(-t * jax.nn.log_sigmoid(x) - (1 - t) * jax.nn.log_sigmoid(-x), weights)


def value_hl_gauss(
    logits: Float[Array, "*rows M"],
    targets: Float[Array, "*rows"],
    weights: Shaped[Array, "*rows"],
    histogram: Histogram,
) -> MaskedSum:
    """Cross-entropy between the histogram of the target and that of the logits, weighted."""
    probs = encode_value(_admit(targets, weights), histogram)
    logits = jnp.where((weights != 0)[..., None], logits.astype(jnp.float32), 0.0)
    return weighted_sum(-(probs * jax.nn.log_softmax(logits, axis=-1)).sum(-1), weights)


def encode_value(values: Float[Array, "*rows"], histogram: Histogram) -> Float32[Array, "*rows M"]:
    """A Gaussian around each value, as its probability in each bin; values are clipped to the
    histogram's range, and the bins' probabilities sum to one."""
    values = jnp.clip(values.astype(jnp.float32), histogram.low, histogram.high)
    z = (bin_edges(histogram) - values[..., None]) / (jnp.sqrt(2.0) * histogram.sigma)
    below = jax.lax.erf(z)
    mass = below[..., 1:] - below[..., :-1]
    return mass / (below[..., -1:] - below[..., :1])


def _admit(array: Array, weights: Array) -> Array:
    """Zeros where nothing is admitted, so that NaNs there reach no gradient either."""
    return jnp.where(weights != 0, array.astype(jnp.float32), 0.0)
