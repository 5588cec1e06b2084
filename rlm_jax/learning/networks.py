"""The networks that learn, and the loss of both on one token batch.

The one idea: policy and value head read one trunk in one forward, and every objective is a column
of the batch (`rlm_jax.data.packing.TokenBatch`): supervised steps, a search's improved policy as
soft labels, exact or backed-up values. So supervised training and search distillation are one loss
on two sources of batches (Blueprint 2501.11223, C.2 and C.3; AlphaZero's loss, 1712.01815).

What is learned is `Networks`, or with LoRA `Adapted`: adapters of a policy that stays as it is.
That policy, the one a phase of training begins with, is called the base; it is also what a policy
is held near to by the KL term (spec B5, C2.5), so one argument of the loss serves both.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.metrics import Metrics
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float32, Key
from rlm_jax.data.packing import TokenBatch
from rlm_jax.learning import losses, values
from rlm_jax.learning.kl import ESTIMATORS, exact_kl, kl_penalty
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import (
    HeadConfig,
    ValueHead,
    apply_value_head,
    goal_logits,
    init_value_head,
    value_logits,
)
from rlm_jax.models.histogram import Histogram
from rlm_jax.models.lora import Lora, LoraConfig, init_lora, merge_lora
from rlm_jax.models.mixed import MATMUL_DTYPES, round_products
from rlm_jax.models.params import Params, init_params
from rlm_jax.models.transformer import forward, unembed

# What trains a head of each kind; the values of all are chances of success.
VALUE_HEADS = {"sigmoid": ("bce", "mse"), "hl_gauss": ("hl_gauss",), "goals": ("bce", "mse")}
VALUE_LOSSES = ("mse", "bce", "hl_gauss")
KL_ESTIMATORS = ("exact", *ESTIMATORS)


@struct
class Networks:
    """A policy and the value head on its last hidden states."""

    policy: Params
    value_head: ValueHead


def mean_networks(networks: Iterable[Networks]) -> Networks:
    """The mean of their weights, one by one: of states that training went through one after the
    other it is better than each of them (stochastic weight averaging, Izmailov et al. 2018, arXiv
    1803.05407; of several runs Wortsman et al. 2022, arXiv 2203.05482).

    Args:
      networks: of one shape; at least one. Each is read before the next is asked for, which may
        then donate it: their sum is all that is kept.

    Raises:
      ValueError: there are none.
    """
    total, count = None, 0
    for one in networks:
        if total is None:
            total = jax.tree.map(jnp.copy, one)
        else:
            total = jax.tree.map(jnp.add, total, one)
        count += 1
    if total is None:
        raise ValueError("the mean of no networks: at least one is needed")
    return jax.tree.map(lambda weights: weights / count, total)


@struct
class Adapted:
    """What LoRA learns: adapters of a policy that is kept elsewhere, and the value head."""

    lora: Lora
    value_head: ValueHead


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """value_coef: weight of the value loss beside the policy's. goal_coef: weight of that of all
    goals, where the batch knows them, by a head that judges many. value_loss: "mse" on the head's
    output; "bce", for a head that ends in a sigmoid; "hl_gauss", for one that is a histogram.
    z_coef: weight of `losses.z_penalty`. kl_coef: weight of KL(policy || base). kl_estimator:
    "exact", over the vocabulary at each token, or one of `kl.ESTIMATORS` on the batch's tokens,
    which is what its name says where they were sampled from the policy. matmul_dtype: of the
    policy's products, see `rlm_jax.models.mixed`; all else is float32.
    """

    value_coef: float = 0.1
    goal_coef: float = 0.0
    value_loss: str = "bce"
    z_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "exact"
    matmul_dtype: str = "float32"

    def __post_init__(self):
        if self.matmul_dtype not in MATMUL_DTYPES:
            raise ValueError(f"matmul_dtype {self.matmul_dtype!r}: accepted are {MATMUL_DTYPES}")
        if self.value_loss not in VALUE_LOSSES:
            raise ValueError(f"value_loss {self.value_loss!r}: accepted are {VALUE_LOSSES}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator {self.kl_estimator!r}: accepted are {KL_ESTIMATORS}")
        for name in ("value_coef", "goal_coef", "z_coef", "kl_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number >= 0, got {getattr(self, name)}")


@struct
class Totals:
    """Weights that a loss is divided by: of the whole batch, whatever part of it is at hand."""

    policy: Float32[Array, ""]
    value: Float32[Array, ""]
    goals: Float32[Array, ""]


def choose_head(kind: str, value_loss: str, num_goals: int = 0) -> HeadConfig:
    """The value head of a kind: "sigmoid", "hl_gauss" for a histogram over [0, 1], or "goals", a
    sigmoid beside which all the goals that a problem may have are learned.

    Raises:
      ValueError: the kind is unknown, the loss does not train it, or there are no goals.
    """
    if kind not in VALUE_HEADS:
        raise ValueError(f"value_head {kind!r}: accepted are {tuple(VALUE_HEADS)}")
    if value_loss not in VALUE_HEADS[kind]:
        raise ValueError(
            f"value_loss {value_loss!r} does not train value_head {kind!r}: accepted are "
            f"{VALUE_HEADS[kind]}"
        )
    if kind == "hl_gauss":
        return HeadConfig((), "none", Histogram(0.0, 1.0))
    if kind == "goals":
        if not num_goals:
            raise ValueError(f"value_head {kind!r}: the task names no goals")
        return HeadConfig((), "sigmoid", num_goals=num_goals)
    return HeadConfig((), kind)


def init_networks(key: Key[Array, ""], cfg: ModelConfig, head: HeadConfig) -> Networks:
    """Draws both networks, in float32."""
    policy_key, head_key = jax.random.split(key)
    return Networks(
        policy=init_params(policy_key, cfg, jnp.float32),
        value_head=init_value_head(head_key, cfg.model_dim, head),
    )


def init_adapted(
    key: Key[Array, ""], networks: Networks, cfg: ModelConfig, lora: LoraConfig
) -> Adapted:
    """Draws adapters that change nothing yet; the value head goes on as it is."""
    return Adapted(init_lora(key, cfg, lora), networks.value_head)


def assemble(
    learned: Networks | Adapted, base: Params | None = None, lora: LoraConfig | None = None
) -> Networks:
    """The networks that are searched with and exported: adapters are merged into the base.

    Raises:
      ValueError: adapters without a base or their config.
    """
    if isinstance(learned, Networks):
        return learned
    if base is None or lora is None:
        raise ValueError("adapters need the policy that they change, and their LoraConfig")
    return Networks(merge_lora(base, learned.lora, lora), learned.value_head)


def total_weights(batch: TokenBatch) -> Totals:
    """What `token_loss` divides by; at least 1, so that an empty batch gives 0."""
    return Totals(
        policy=jnp.maximum(batch.loss_weight.sum(), 1.0),
        value=jnp.maximum(batch.value_weight.sum(), 1.0),
        goals=jnp.maximum((batch.goals != 0).sum().astype(jnp.float32), 1.0),
    )


def token_loss(
    learned: Networks | Adapted,
    batch: TokenBatch,
    totals: Totals,
    base: Params | None = None,
    *,
    model: ModelConfig,
    cfg: LossConfig,
    lora: LoraConfig | None = None,
) -> tuple[Float32[Array, ""], Metrics]:
    """Cross-entropy of the policy plus the value loss, over the tokens that carry weight.

    Where a token has alternatives the policy's loss is KL(alternatives || policy): cross-entropy
    less its least possible value, so that 0 is perfect and losses of different mixes compare.

    Args:
      totals: `total_weights` of the batch, or of the larger batch that this one is a part of;
        losses and gradients of the parts then add up to those of the whole.
      base: the policy that training began with; adapters change it, and `kl_coef` holds the policy
        near it. It gets no gradient, and is not touched where neither is wanted.
      lora: of adapters.

    Raises:
      ValueError: there is no base where one is needed, or a value loss does not fit the head.
    """
    networks = assemble(learned, base, lora)
    hidden, logits = _read_rows(networks.policy, batch, model, cfg)
    labels = jax.tree.map(lambda column: column[:, 1:], batch)
    parts = _policy_losses(logits, labels)
    parts["value_loss"] = _value_loss(networks.value_head, hidden, batch, cfg)
    loss = (parts["token_loss"].total + parts["choice_loss"].total) / totals.policy
    loss += cfg.value_coef * parts["value_loss"].total / totals.value
    if cfg.goal_coef:
        parts["goal_loss"] = _goal_loss(networks.value_head, hidden, batch)
        loss += cfg.goal_coef * parts["goal_loss"].total / totals.goals
    if cfg.z_coef:
        parts["z_loss"] = losses.z_penalty(logits, labels.loss_weight)
        loss += cfg.z_coef * parts["z_loss"].total / totals.policy
    if cfg.kl_coef:
        if base is None:
            raise ValueError(f"kl_coef={cfg.kl_coef} needs the policy that training began with")
        _, reference = _read_rows(base, batch, model, cfg)
        parts["kl"] = _divergence(logits, reference, labels, cfg.kl_estimator)
        loss += cfg.kl_coef * parts["kl"].total / totals.policy
    return loss, parts


def _read_rows(
    policy: Params, batch: TokenBatch, model: ModelConfig, cfg: LossConfig
) -> tuple[Array, Array]:
    """Hidden states at all tokens, and logits at all but the last: position t predicts t + 1 (the
    first token of a segment has weight 0)."""
    if cfg.matmul_dtype != "float32":
        policy = round_products(policy, model)
    attend = make_dense_attend(model, segment_ids=batch.segments)
    hidden, _ = forward(policy, batch.tokens, batch.positions, cfg=model, attend=attend)
    return hidden, unembed(policy, hidden[:, :-1], cfg=model)


def _divergence(logits: Array, reference: Array, labels: TokenBatch, estimator: str) -> MaskedSum:
    """KL(policy || reference) at the tokens that the policy learns from."""
    if estimator == "exact":
        return exact_kl(logits, reference, labels.loss_weight)
    logs, others = (losses.token_logprobs(array, labels.tokens) for array in (logits, reference))
    return kl_penalty(logs, others, labels.loss_weight, estimator)


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
    targets, weights = batch.value_target, batch.value_weight
    if (head.histogram is not None) != (cfg.value_loss == "hl_gauss"):
        kind = "one number" if head.histogram is None else "a histogram"
        raise ValueError(f"value_loss {cfg.value_loss!r} does not train a head of {kind}")
    if cfg.value_loss == "mse":
        return values.value_mse(apply_value_head(head, hidden), targets, weights)
    logits = value_logits(head, hidden)
    if head.histogram is not None:
        return values.value_hl_gauss(logits, targets, weights, head.histogram)
    # Before its sigmoid, where nothing is rounded to 0 or 1.
    return values.value_bce(logits[..., 0], targets, weights)


def _goal_loss(head: ValueHead, hidden: Array, batch: TokenBatch) -> MaskedSum:
    if head.goals is None:
        raise ValueError("goal_coef trains a head for many goals, and this one has a single value")
    if not batch.goals.shape[-1]:
        return MaskedSum(jnp.float32(0), jnp.float32(0))
    labels = (batch.goals > 0).astype(jnp.float32)
    return values.value_bce(goal_logits(head.goals, hidden), labels, batch.goals != 0)
