"""Staying near a reference policy: estimators of KL on sampled tokens, and the exact divergence.

With d = log ref - log pi at tokens sampled from pi, each estimates KL(pi || ref) (Schulman 2020,
"Approximating KL divergence"; golden G13):

  k1 = -d                unbiased, of either sign; as a loss its expected gradient is 0
  k2 = d^2 / 2           biased, >= 0; its gradient is that of KL(pi || ref): the one for losses
  k3 = exp(d) - d - 1    unbiased, >= 0, low variance: the one for reports (and GRPO's loss); its
                         gradient is that of KL(ref || pi)
  x1 = ref (log ref - log pi)   x1's surrogate on the chosen tokens (spec B5, D.4); of either sign

The reference is a policy of its own: for LoRA the parameters *without* the adapter. Evaluated with
the trained adapter in place the divergence is 0 whatever is learned, which is how two published
trainers run; a test holds this one above 0 after a single step.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.types import Array, Float, Float32, Shaped
from rlm_jax.learning.losses import weighted_sum

ESTIMATORS = ("k1", "k2", "k3", "x1")
_MOST_GAP = 30.0


def estimate_kl(
    logprob: Float[Array, "..."], reference: Float[Array, "..."], estimator: str = "k3"
) -> Float32[Array, "..."]:
    """The estimate at each sampled token.

    Args:
      logprob, reference: log-probabilities of the tokens under the trained policy and under the
        reference, which gets no gradient.

    Raises:
      ValueError: the estimator is unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r}: accepted are {ESTIMATORS}")
    reference = jax.lax.stop_gradient(reference.astype(jnp.float32))
    gap = reference - logprob.astype(jnp.float32)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap * gap / 2
    if estimator == "x1":
        return jnp.exp(reference) * gap
    # expm1 keeps the small differences of the first updates; the bound keeps a token that the
    # policy has all but ruled out from making the sum infinite.
    gap = jnp.minimum(gap, _MOST_GAP)
    return jnp.expm1(gap) - gap


def kl_penalty(
    logprob: Float[Array, "..."],
    reference: Float[Array, "..."],
    weights: Shaped[Array, "..."],
    estimator: str = "k3",
) -> MaskedSum:
    """The estimates, weighted; log-probabilities may be anything where the weight is 0."""
    admitted = weights != 0
    logprob = jnp.where(admitted, logprob, 0.0)
    reference = jnp.where(admitted, reference, 0.0)
    return weighted_sum(estimate_kl(logprob, reference, estimator), weights)


def exact_kl(
    logits: Float[Array, "*rows V"],
    reference: Float[Array, "*rows V"],
    weights: Shaped[Array, "*rows"],
) -> MaskedSum:
    """KL(pi || ref) over the whole vocabulary at each position, weighted; ref gets no gradient."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    reference = jax.lax.stop_gradient(reference.astype(jnp.float32))
    gap = logs - jax.nn.log_softmax(reference, axis=-1)
    return weighted_sum((jnp.exp(logs) * gap).sum(-1), weights)
