"""Between tokens and reasoning steps: a step is one action, its tokens are how it is said.

A step's log-probability is the sum over its tokens (spec A2), and a step's advantage, weight or
value label is that of each of its tokens (A7, B3). Which token belongs to which step is an array
of ids, -1 for tokens of no step (prompt, padding).
"""

import jax.numpy as jnp

from rlm_jax.core.types import Array, Float32, Int32, Shaped


def sum_by_step(
    values: Shaped[Array, "*B T"], step_ids: Int32[Array, "*B T"], num_steps: int
) -> Float32[Array, "*B S"]:
    """Sums of token values over each of the S = num_steps steps of a row, 0 for an empty step.

    Log-probabilities give the steps' log-probabilities, ones give their lengths. Ids outside of
    [0, S) belong to no step.
    """
    of_step = step_ids[..., None, :] == jnp.arange(num_steps)[:, None]
    values = values.astype(jnp.float32)[..., None, :]
    return jnp.where(of_step, values, 0.0).sum(-1)


def spread_over_tokens(
    values: Shaped[Array, "*B S"], step_ids: Int32[Array, "*B T"]
) -> Float32[Array, "*B T"]:
    """Each token's share in its step's value: the value itself; 0 for tokens of no step."""
    num_steps = values.shape[-1]
    real = (step_ids >= 0) & (step_ids < num_steps)
    at = jnp.clip(step_ids, 0, num_steps - 1)
    return jnp.where(real, jnp.take_along_axis(values.astype(jnp.float32), at, -1), 0.0)
