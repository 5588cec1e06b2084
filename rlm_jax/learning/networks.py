"""The networks that learn, and the loss of both on one token batch.

The one idea: policy and value head read one trunk in one forward, and every objective is a column
of the batch (`rlm_jax.data.packing.TokenBatch`): supervised steps, a search's improved policy as
soft labels, exact or backed-up values. So supervised training and search distillation are one loss
on two sources of batches (Blueprint 2501.11223, C.2 and C.3; AlphaZero's loss, 1712.01815).
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.metrics import Metrics
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float32, Key
from rlm_jax.data.packing import TokenBatch
from rlm_jax.learning import losses, values
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import HeadConfig, ValueHead, apply_value_head, init_value_head
from rlm_jax.models.params import Params, init_params
from rlm_jax.models.transformer import forward, unembed

VALUE_LOSSES = ("mse", "bce")


@struct
class Networks:
    """A policy and the value head on its last hidden states."""

    policy: Params
    value_head: ValueHead


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """value_coef: weight of the value loss beside the policy's. value_loss: "mse" on the head's
    output, or "bce", for a head that ends in a sigmoid. z_coef: weight of `losses.z_penalty`."""

    value_coef: float = 0.1
    value_loss: str = "bce"
    z_coef: float = 0.0

    def __post_init__(self):
        if self.value_loss not in VALUE_LOSSES:
            raise ValueError(f"value_loss {self.value_loss!r}: accepted are {VALUE_LOSSES}")
        if self.value_coef < 0 or self.z_coef < 0:
            raise ValueError(f"value_coef={self.value_coef} and z_coef={self.z_coef}: >= 0")


@struct
class Totals:
    """Weights that a loss is divided by: of the whole batch, whatever part of it is at hand."""

    policy: Float32[Array, ""]
    value: Float32[Array, ""]


def init_networks(key: Key[Array, ""], cfg: ModelConfig, head: HeadConfig) -> Networks:
    """Draws both networks, in float32."""
    policy_key, head_key = jax.random.split(key)
    return Networks(
        policy=init_params(policy_key, cfg, jnp.float32),
        value_head=init_value_head(head_key, cfg.model_dim, head),
    )


def total_weights(batch: TokenBatch) -> Totals:
    """What `token_loss` divides by; at least 1, so that an empty batch gives 0."""
    return Totals(
        policy=jnp.maximum(batch.loss_weight.sum(), 1.0),
        value=jnp.maximum(batch.value_weight.sum(), 1.0),
    )


def token_loss(
    networks: Networks, batch: TokenBatch, totals: Totals, *, model: ModelConfig, cfg: LossConfig
) -> tuple[Float32[Array, ""], Metrics]:
    """Cross-entropy of the policy plus the value loss, over the tokens that carry weight.

    Where a token has alternatives the policy's loss is KL(alternatives || policy): cross-entropy
    less its least possible value, so that 0 is perfect and losses of different mixes compare.

    Args:
      totals: `total_weights` of the batch, or of the larger batch that this one is a part of;
        losses and gradients of the parts then add up to those of the whole.
    """
    hidden, _ = forward(
        networks.policy,
        batch.tokens,
        batch.positions,
        cfg=model,
        attend=make_dense_attend(model, segment_ids=batch.segments),
    )
    # Position t predicts t + 1; the first token of a segment has weight 0.
    logits = unembed(networks.policy, hidden[:, :-1], cfg=model)
    parts = _policy_losses(logits, jax.tree.map(lambda column: column[:, 1:], batch))
    parts["value_loss"] = _value_loss(networks.value_head, hidden, batch, cfg)
    loss = (parts["token_loss"].total + parts["choice_loss"].total) / totals.policy
    loss += cfg.value_coef * parts["value_loss"].total / totals.value
    if cfg.z_coef:
        parts["z_loss"] = losses.z_penalty(logits, batch.loss_weight[:, 1:])
        loss += cfg.z_coef * parts["z_loss"].total / totals.policy
    return loss, parts


def _policy_losses(logits: Array, labels: TokenBatch) -> dict[str, MaskedSum]:
    """Losses of tokens with one label and with several, and how often the best guess is right."""
    weight = labels.loss_weight
    choice = labels.soft_weights.sum(-1)
    hard = jnp.where(choice > 0, 0.0, weight)
    shares = labels.soft_weights * weight[..., None]
    soft = losses.soft_cross_entropy(logits, labels.soft_ids, shares)
    least = losses.label_entropy(labels.soft_weights, weight)
    best = logits.argmax(-1)
    chosen = ((labels.soft_ids == best[..., None]) & (labels.soft_weights > 0)).any(-1)
    return {
        "token_loss": losses.cross_entropy(logits, labels.tokens, hard),
        "choice_loss": MaskedSum(soft.total - least.total, soft.count),
        "token_accuracy": losses.token_accuracy(logits, labels.tokens, hard),
        "choice_accuracy": losses.weighted_sum(chosen, jnp.where(choice > 0, weight, 0.0)),
    }


def _value_loss(head: ValueHead, hidden: Array, batch: TokenBatch, cfg: LossConfig) -> MaskedSum:
    if cfg.value_loss == "mse":
        predicted = apply_value_head(head, hidden)
        return values.value_mse(predicted, batch.value_target, batch.value_weight)
    # Before its sigmoid, where nothing is rounded to 0 or 1.
    logits = apply_value_head(dataclasses.replace(head, squash="none"), hidden)
    return values.value_bce(logits, batch.value_target, batch.value_weight)
