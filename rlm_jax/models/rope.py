"""Rotary position embeddings in the half-rotation convention, with their scaled variants.

Feature i of a head pairs with feature i + E/2. Frequencies are computed once in float64 on the
host; cos and sin once per forward pass and distinct base, in float32.

Papers: RoFormer (arXiv 2104.09864); linear scaling (2306.15595); YaRN (2309.00071); the "llama3"
rule is Llama 3.1's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.types import Array, Float, Float32, Int32
from rlm_jax.models.config import ModelConfig, RopeScaling

RopeTable = tuple[Float32[Array, "R T half"], Float32[Array, "R T half"]]


def inverse_frequencies(
    theta: float, head_dim: int, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
    """Radians per position of each feature pair ([E/2] float32), and the multiplier of cos, sin."""
    base = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    multiplier = 1.0
    if scaling.kind == "linear":
        base = base / scaling.factor
    elif scaling.kind == "llama3":
        base = base / llama3_factors(base, scaling)
    elif scaling.kind == "yarn":
        keep = _yarn_keep(theta, head_dim, scaling)
        base = base * keep + base / scaling.factor * (1 - keep)
        multiplier = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return base.astype(np.float32), multiplier


def llama3_factors(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """By what each frequency is divided: `factor` for wavelengths beyond the trained context over
    low_freq_factor, 1 below it over high_freq_factor, blended (in frequency) between."""
    turns = scaling.original_context * base / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / (keep + (1 - keep) / scaling.factor)


def _yarn_keep(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """Share of the unscaled frequency that each feature pair keeps ([E/2], 1 for fast ones)."""

    def pair_of(turns: float) -> float:
        span = scaling.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rope_tables(cfg: ModelConfig, positions: Int32[Array, "R T"]) -> dict[bool, RopeTable]:
    """cos and sin [R,T,E/2] of every base that some layer uses, by `cfg.layer_has_local_rope`."""
    tables = {}
    for local in {cfg.layer_has_local_rope(layer) for layer in range(cfg.num_layers)}:
        theta = cfg.rope_local_theta if local and cfg.rope_local_theta else cfg.rope_theta
        scaling = RopeScaling() if local else cfg.rope_scaling
        frequencies, multiplier = inverse_frequencies(theta, cfg.head_dim, scaling)
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        tables[local] = tuple(_compute_once(fn(angles) * multiplier) for fn in (jnp.cos, jnp.sin))
    return tables


def _compute_once(x: Array) -> Array:
    """`x`, as a product with the identity on CPU: there XLA fuses what computes it into every use
    (a cosine for each layer, head and feature), barrier or not, but never through a product."""

    def multiply(x: Array) -> Array:
        return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")

    return jax.lax.platform_dependent(x, cpu=multiply, default=lambda x: x)


def apply_rope(x: Float[Array, "R T H E"], table: RopeTable) -> Float[Array, "R T H E"]:
    """Rotates each head's feature pairs (i, i + E/2); float32 inside, the dtype of `x` outside."""
    cos, sin = table[0][:, :, None, :], table[1][:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
