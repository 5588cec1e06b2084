"""The losses of a state value network, from exact labels: all goals of each state, or some of them.

Binary cross-entropy of every goal that a state may be asked for (spec A3 design i, per goal; the
universal value function of Schaul et al. 2015). A state that a label calls unknown is not learned.
Where a network is asked about each goal by itself, a sample of them stands for all: the loss is the
same but for the noise.
"""

import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.metrics import Metrics
from rlm_jax.core.types import Array, Float32
from rlm_jax.data.countdown_states import AskedBatch, StateBatch
from rlm_jax.learning.values import value_bce
from rlm_jax.models.state_value import StateValue, asked_goal_logits, state_goal_logits


def count_goals(batch: StateBatch) -> Float32[Array, ""]:
    """What `state_value_loss` divides by: labels of the whole batch, at least 1."""
    return jnp.maximum((batch.goals != 0).sum().astype(jnp.float32), 1.0)


def state_value_loss(
    network: StateValue, batch: StateBatch, total: Float32[Array, ""]
) -> tuple[Float32[Array, ""], Metrics]:
    """Cross-entropy a label.

    Args:
      total: `count_goals` of the batch, or of the larger one that this one is a part of.
    """
    logits = state_goal_logits(network, batch.items)
    known, labels = batch.goals != 0, (batch.goals > 0).astype(jnp.float32)
    loss = value_bce(logits, labels, known)
    right = ((logits > 0) == (batch.goals > 0)) & known
    accuracy = MaskedSum(right.sum().astype(jnp.float32), loss.count)
    return loss.total / total, {"goal_loss": loss, "goal_accuracy": accuracy}


def count_asked(batch: AskedBatch) -> Float32[Array, ""]:
    """What `asked_value_loss` divides by: goals that those asked about stand for, at least 1."""
    return jnp.maximum(batch.weights.sum(), 1.0)


def asked_value_loss(
    network: StateValue, batch: AskedBatch, total: Float32[Array, ""]
) -> tuple[Float32[Array, ""], Metrics]:
    """Cross-entropy a goal, those that are asked about standing for all; `total` as above."""
    logits = asked_goal_logits(network, batch.items, batch.goals)
    loss = value_bce(logits, batch.labels, batch.weights)
    right = ((logits > 0) == (batch.labels > 0)) * batch.weights
    accuracy = MaskedSum(right.sum(), loss.count)
    return loss.total / total, {"goal_loss": loss, "goal_accuracy": accuracy}
