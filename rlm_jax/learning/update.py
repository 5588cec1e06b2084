"""The update step: gradients over microbatches, an optimizer, and a guard against NaN.

The one idea: a training state is a pytree and an update is a pure function of it, so that the same
function stands in a supervised step, in a compiled step behind a search, and on any mesh. What the
loss divides by is known before the batch is cut (`networks.Totals`), so microbatches add up to the
update of the whole batch.

Matrices are learned by Muon (Jordan 2024; with updates of root mean square 0.2 as in Moonlight,
arXiv 2502.16982, so that learning rates are those of AdamW), everything else by AdamW.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import contrib

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.metrics import Metrics, add_metrics
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32, PyTree
from rlm_jax.learning.networks import total_weights
from rlm_jax.models.params import name_leaves

OPTIMIZERS = ("muon", "adamw")
_EMBEDDINGS = ("embed", "lm_head")
# Metrics that follow from the others, in this order.
_WHOLE = ("loss", "grad_norm", "update_norm")


@struct
class TrainState:
    """What training carries from step to step.

    step: updates done. params: what is learned. opt_state: of the optimizer. healthy: no update has
    been refused; once one has, the state stays as it was before it, until `accept_updates`.
    """

    step: Int32[Array, ""]
    params: PyTree
    opt_state: PyTree
    healthy: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """name: "muon" or "adamw". learning_rate: at the top of the schedule; of matrices under Muon.
    adam_learning_rate: of everything else under Muon. warmup_steps: linear rise. num_steps: of the
    schedule. decay_share: the last part of the steps, in which the rate falls linearly to
    `final_share` of its top (a trapezoid: a run can be lengthened without redoing it).
    weight_decay: of matrices. clip_norm: of the gradient's global norm; 0 for none.
    """

    name: str = "muon"
    learning_rate: float = 1e-2
    adam_learning_rate: float = 3e-3
    warmup_steps: int = 100
    num_steps: int = 1000
    decay_share: float = 0.4
    final_share: float = 0.02
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta2: float = 0.98

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.name!r}: accepted are {OPTIMIZERS}")
        for name in ("learning_rate", "adam_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("decay_share", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.num_steps or self.num_steps < 1:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} of num_steps={self.num_steps}: accepted is "
                "0 <= warmup_steps <= num_steps, and a step at least"
            )
        if self.clip_norm < 0 or self.weight_decay < 0:
            raise ValueError(f"clip_norm={self.clip_norm}, weight_decay={self.weight_decay}: >= 0")


# (params, batch, totals) -> loss, metrics; search training may add `base` to the arguments.
Loss = Callable[..., tuple[Array, Metrics]]


def make_schedule(cfg: OptimizerConfig) -> optax.Schedule:
    """Shares of the learning rate: up, level, and down at the end."""
    decay = max(1, round(cfg.decay_share * cfg.num_steps))
    # A decay that would begin while the rate still rises begins behind that, and is shorter.
    level = max(cfg.warmup_steps, cfg.num_steps - decay)
    parts = [
        optax.linear_schedule(1 / max(cfg.warmup_steps, 1), 1.0, max(cfg.warmup_steps, 1)),
        optax.constant_schedule(1.0),
        optax.linear_schedule(1.0, cfg.final_share, max(1, cfg.num_steps - level)),
    ]
    return optax.join_schedules(parts, [cfg.warmup_steps, level])


def make_optimizer(cfg: OptimizerConfig, params: PyTree) -> optax.GradientTransformation:
    """The optimizer of `params`, or of arrays of their shapes.

    Its state holds arrays by the parameters' names, whatever struct they stand in.
    """
    schedule = make_schedule(cfg)

    def scaled(rate: float) -> optax.Schedule:
        return lambda step: rate * schedule(step)

    if cfg.name == "adamw":
        inner = optax.adamw(
            scaled(cfg.learning_rate), b2=cfg.beta2, weight_decay=cfg.weight_decay, mask=_are_wide
        )
    else:
        inner = contrib.muon(
            scaled(cfg.learning_rate),
            adam_learning_rate=scaled(cfg.adam_learning_rate),
            adam_b2=cfg.beta2,
            weight_decay=cfg.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions(name_leaves(params)),
        )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    chained = optax.chain(clip, inner)

    def init(params: PyTree) -> PyTree:
        return chained.init(name_leaves(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        named, state = chained.update(name_leaves(updates), state, name_leaves(params))
        leaves = [cast(dict, named)[name] for name in name_leaves(updates)]
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformation(init, update)


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        healthy=jnp.bool_(True),
    )


def update_state(
    state: TrainState,
    batch: PyTree,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_microbatches: int = 1,
    totals_fn: Callable[[Any], PyTree] = total_weights,
) -> tuple[TrainState, dict[str, MaskedSum]]:
    """One update, unless its loss, its gradient or the update itself is not finite.

    Args:
      batch: a `TokenBatch`, or what else `totals_fn` and the loss know; its rows are a multiple of
        `num_microbatches`.
      loss: (params, part of the batch, totals of the batch) -> loss, metrics.

    Returns:
      The next state, and metrics, among them `loss`, `grad_norm` and `update_norm`.

    Raises:
      ValueError: the rows cannot be cut into that many microbatches.
    """
    totals = totals_fn(batch)
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        (value, metrics), grads = grad_fn(state.params, batch, totals)
    else:
        parts = _split(batch, num_microbatches)
        first = jax.tree.map(lambda array: array[0], parts)
        shapes = jax.eval_shape(grad_fn, state.params, first, totals)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def accumulate(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, carry, grad_fn(state.params, part, totals)), None

        ((value, metrics), grads), _ = jax.lax.scan(accumulate, zeros, parts)
    norm = optax.tree.norm(grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    change = optax.tree.norm(updates)
    healthy = state.healthy & jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(change)
    keep = functools.partial(jnp.where, healthy)
    following = TrainState(
        step=state.step + healthy,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        healthy=healthy,
    )
    one = jnp.float32(1)
    return following, {
        **metrics,
        "loss": MaskedSum(value, one),
        "grad_norm": MaskedSum(norm, one),
        "update_norm": MaskedSum(change, one),
    }


def sum_metrics(steps: list[dict[str, MaskedSum]]) -> dict[str, MaskedSum]:
    """Adds the metrics of several steps."""
    return functools.reduce(add_metrics, steps)


class BadStep(NamedTuple):
    """A step whose update was refused: its number, and its first metric that is not finite."""

    step: int
    metric: str
    value: float


def find_bad_step(steps: Sequence[Mapping[str, MaskedSum]], last_step: int) -> BadStep | None:
    """The first of several steps, the last of which is `last_step`, with a metric that is not
    finite; None where all are. Reads the device once.

    Of a step's metrics, the parts of a loss come before the loss, and that before the norms.
    """
    means = jax.device_get([{n: each.mean() for n, each in step.items()} for step in steps])
    for number, metrics in enumerate(means, start=last_step - len(steps) + 1):
        parts = [name for name in metrics if name not in _WHOLE]
        for name in (*parts, *_WHOLE):
            if not math.isfinite(metrics[name]):
                return BadStep(number, name, float(metrics[name]))
    return None


def accept_updates(state: PyTree) -> PyTree:
    """A state (a `TrainState`, or what holds one) that goes on learning after a refused update."""

    def heal(node: Any) -> Any:
        if not isinstance(node, TrainState):
            return node
        return dataclasses.replace(node, healthy=jnp.ones_like(node.healthy))

    return jax.tree.map(heal, state, is_leaf=lambda node: isinstance(node, TrainState))


def spread_state(mesh: Mesh, state: PyTree) -> PyTree:
    """Puts on the mesh, whole on every device, what of a state does not lie there yet."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Array) -> Array:
        there = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else jax.device_put(leaf, whole)

    return jax.tree.map(place, state)


def _split(batch: PyTree, num_parts: int) -> PyTree:
    def cut(array: Array) -> Array:
        if array.shape[0] % num_parts:
            raise ValueError(f"{array.shape[0]} rows cannot be cut into {num_parts} microbatches")
        # Strided, so that every part has rows of every device's share.
        num_rows = array.shape[0] // num_parts
        return jnp.swapaxes(array.reshape(num_rows, num_parts, *array.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def _is_matrix(name: str, leaf: Any) -> bool:
    return leaf.ndim == 2 and min(leaf.shape) > 1 and name.split(".")[-1] not in _EMBEDDINGS


def _muon_dimensions(named: Mapping[str, Any]) -> dict[str, Any]:
    """Matrices are stored [out, in]; None leaves a parameter to AdamW."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    return {name: matrix if _is_matrix(name, leaf) else None for name, leaf in named.items()}


def _are_wide(named: Mapping[str, Any]) -> dict[str, bool]:
    return {name: _is_matrix(name, leaf) for name, leaf in named.items()}
