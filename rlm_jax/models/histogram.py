"""A value as a histogram: the bins of a categorical value head and how a number is read out.

Values in [low, high] are spread over `num_bins` equal bins whose support reaches a margin beyond
both ends, so that a Gaussian around an end is not cut; the value of a histogram is the mean of its
bins' centres. The loss that trains such a head is HL-Gauss, `learning/values.py`
(Farebrother et al. 2024, "Stop Regressing", arXiv 2403.03950).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Float, Float32
from rlm_jax.models.config import check_count

# Of the standard deviation, on each side: what is cut off is 0.3% of an end's Gaussian.
_MARGIN_SIGMAS = 3.0


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Bins for values in [low, high].

    num_bins: of equal width, margins included. sigma_bins: standard deviation of a target's
    Gaussian in bins; the paper's 0.75 puts most of it on six bins.

    Raises:
      ValueError: an empty range, or too few bins for range and margins.
    """

    low: float = 0.0
    high: float = 1.0
    num_bins: int = 41
    sigma_bins: float = 0.75

    def __post_init__(self):
        check_count("num_bins", self.num_bins)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a histogram needs low < high, got [{self.low}, {self.high}]")
        if not (math.isfinite(self.sigma_bins) and self.sigma_bins > 0):
            raise ValueError(f"sigma_bins must be a number > 0, got {self.sigma_bins}")
        if self.num_bins <= 2 * self.margin_bins:
            least = 2 * self.margin_bins + 1
            raise ValueError(
                f"num_bins={self.num_bins}: a standard deviation of {self.sigma_bins} bins needs "
                f"at least {least}"
            )

    @property
    def margin_bins(self) -> int:
        """Bins beyond each end of the range."""
        return math.ceil(_MARGIN_SIGMAS * self.sigma_bins)

    @property
    def bin_width(self) -> float:
        """Width of a bin, in values."""
        return (self.high - self.low) / (self.num_bins - 2 * self.margin_bins)

    @property
    def sigma(self) -> float:
        """Standard deviation of a target's Gaussian, in values."""
        return self.sigma_bins * self.bin_width


def bin_edges(histogram: Histogram) -> Float32[Array, "edges"]:
    """The edges of the bins, rising."""
    places = jnp.arange(histogram.num_bins + 1, dtype=jnp.float32) - histogram.margin_bins
    return histogram.low + histogram.bin_width * places


def bin_centres(histogram: Histogram) -> Float32[Array, "M"]:
    """The middles of the bins."""
    edges = bin_edges(histogram)
    return (edges[1:] + edges[:-1]) / 2


def read_out(logits: Float[Array, "*rows M"], histogram: Histogram) -> Float32[Array, "*rows"]:
    """The mean of the centres under softmax(logits), clipped to the range."""
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.clip(probs @ bin_centres(histogram), histogram.low, histogram.high)
