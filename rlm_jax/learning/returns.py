"""Targets along trajectories: returns of rollouts and of padded batches of steps.

Sparse or dense rewards, discount g, a state's value V and an edge's Q = r + g V(next) (spec A3).
The state behind the last step is worth `bootstrap`: 0 where the step was terminal, which is the
Blueprint's V(s_{T+1}) = 0, and the network's value where a trajectory was cut off.

  Monte Carlo   Q(s_t, a_t) = mean of g^(T - t) r over rollouts; V(s_{t+1}) = Q / g (G08, G52)
  n-step        r_t + g r_{t+1} + ... + g^n V(s_{t+n}); TD(0) is n = 1
  GAE           A_t = sum (g lambda)^l delta_{t+l} (Schulman et al. 2016; B6, G10); the
                TD(lambda) return is A_t + V(s_t)

Batches are [B, T] steps, right-padded: a row's `mask` is True for its first steps and False
behind them.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum, masked_sum
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32


def monte_carlo_q(
    rewards: Float[Array, "*B M"],
    steps_to_end: Int32[Array, "*B M"],
    mask: Bool[Array, "*B M"],
    *,
    discount: float = 1.0,
) -> MaskedSum:
    """Sum of discounted outcomes of M rollouts from an edge, and how many there were.

    `.mean()` is Q of the edge (biased low: a good prefix may be spoiled later); the state behind it
    is worth `state_value` of that. More rollouts of the same edge are added field by field.

    Args:
      rewards: terminal reward of each rollout. steps_to_end: T - t, the steps that follow the
        edge's own, 0 for a terminal edge.
    """
    returns = jnp.float32(discount) ** steps_to_end * rewards.astype(jnp.float32)
    return masked_sum(returns, mask, axis=-1)


def state_value(edge_value: Float[Array, "..."], discount: float) -> Float32[Array, "..."]:
    """V of the state behind a non-terminal edge without a reward of its own: Q / g (G52)."""
    return edge_value.astype(jnp.float32) / discount


def n_step_returns(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    bootstrap: Float[Array, "*B"],
    *,
    num_steps: int = 1,
    discount: float = 1.0,
) -> Float32[Array, "*B T"]:
    """Returns over at most `num_steps` steps and the value behind them; 0 at padding.

    Args:
      values: V of the state before each step. num_steps: 1 is TD(0), T or more is Monte Carlo.

    Raises:
      ValueError: num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    rewards, values, bootstrap = _clean(rewards, values, mask, bootstrap)

    def extend(_: Array, returns: Array) -> Array:
        return jnp.where(mask, rewards + discount * _next(returns, mask, bootstrap), 0.0)

    return jax.lax.fori_loop(0, min(num_steps, mask.shape[-1]), extend, values)


def step_gae(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    bootstrap: Float[Array, "*B"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> Float32[Array, "*B T"]:
    """Step-level advantages; 0 at padding.

    Args:
      values: V of the state before each step. trace: lambda; 0 gives TD errors, 1 Monte Carlo.
    """
    rewards, values, bootstrap = _clean(rewards, values, mask, bootstrap)
    deltas = rewards + discount * _next(values, mask, bootstrap) - values

    def step(above: Array, here: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, real = here
        advantage = jnp.where(real, delta + discount * trace * above, 0.0)
        return advantage, advantage

    by_time = jnp.moveaxis(deltas, -1, 0), jnp.moveaxis(mask, -1, 0)
    _, advantages = jax.lax.scan(step, jnp.zeros_like(bootstrap), by_time, reverse=True)
    return jnp.moveaxis(advantages, 0, -1)


def td_lambda_returns(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    bootstrap: Float[Array, "*B"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> Float32[Array, "*B T"]:
    """Value targets that mix all n-step returns: the advantages plus V; 0 at padding."""
    advantages = step_gae(rewards, values, mask, bootstrap, discount=discount, trace=trace)
    return jnp.where(mask, advantages + values.astype(jnp.float32), 0.0)


def _next(values: Array, mask: Array, bootstrap: Array) -> Array:
    """Of each step, the value behind it: the next step's, or `bootstrap` behind the last."""
    last = bootstrap[..., None]
    ends = jnp.concatenate([~mask[..., 1:], jnp.ones_like(mask[..., :1])], -1)
    return jnp.where(ends, last, jnp.concatenate([values[..., 1:], last], -1))


def _clean(rewards: Array, values: Array, mask: Array, bootstrap: Array):
    """In float32, with zeros at padding, so that nothing of it reaches a sum."""
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    return rewards, values, bootstrap.astype(jnp.float32)
