"""Embeddings of number tokens that begin with what the numbers are.

A token per number makes sums short, but drawn at random the embeddings say nothing of values, and
a small network spends most of a short training on learning them. Here a number starts as waves of
its value and of its logarithm: sums are rotations of the ones, products of the others (Fourier
features of numbers: FoNE, arXiv 2502.09741, which keeps them fixed; here they are learned on).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.types import Array, Float, Float32, Int, Key

# Of the value, and of its natural logarithm.
_PERIODS = (2, 3, 4, 5, 7, 10, 11, 20, 25, 50, 100, 200, 400, 1000, 2000)
_LOG_PERIODS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 14.0)
NUM_WAVES = 2 * (len(_PERIODS) + len(_LOG_PERIODS))
_NOISE_SHARE = 0.25  # Of the variance: what tells two numbers apart beyond their value.


def init_number_embeddings(
    key: Key[Array, ""], table: Float[Array, "V D"], numbers: Sequence[int]
) -> Float[Array, "V D"]:
    """The table with the rows of number tokens drawn anew, at the same scale.

    Args:
      numbers: the number that each of the V tokens stands for, -1 for none.

    Raises:
      ValueError: not one number a token.
    """
    if len(numbers) != table.shape[0]:
        raise ValueError(f"{len(numbers)} numbers for a table of {table.shape[0]} tokens")
    values = np.asarray(numbers)
    waves = number_waves(jnp.asarray(np.maximum(values, 0)))
    mix = jax.random.normal(key, (waves.shape[1], table.shape[1]), jnp.float32)
    # Waves of one number have the square sum of half their count.
    mixed = waves @ mix / math.sqrt(waves.shape[1] / 2)
    scale = 1.0 / math.sqrt(table.shape[1])
    rows = math.sqrt(1 - _NOISE_SHARE) * scale * mixed + math.sqrt(_NOISE_SHARE) * table
    return jnp.where(jnp.asarray(values >= 0)[:, None], rows.astype(table.dtype), table)


def number_waves(values: Int[Array, "M"]) -> Float32[Array, "M F"]:
    """Cosine and sine of each period, of the numbers (>= 0) and of their logarithms.

    The logarithm of 0 counts as that of a half.
    """
    values = values.astype(jnp.float32)
    logs = jnp.log(jnp.maximum(values, 0.5))
    angles = jnp.concatenate(
        [
            values[:, None] / jnp.asarray(_PERIODS, jnp.float32),
            logs[:, None] / jnp.asarray(_LOG_PERIODS, jnp.float32),
        ],
        axis=1,
    )
    return jnp.concatenate([jnp.cos(2 * jnp.pi * angles), jnp.sin(2 * jnp.pi * angles)], axis=1)
