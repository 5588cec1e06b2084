"""LoRA: low-rank adapters on the matrices of a frozen model (Hu et al. 2021, arXiv 2106.09685).

Every adapted matrix W [out, in] becomes W + (alpha / r) up down, with down [r, in] drawn and up
[out, r] zero, so that the adapted model starts as the base, bit for bit (spec C2.1, golden G63).

One idea: an adapter is merged into a copy of the parameters, inside the loss, and everything else
(forward, search, decoding) stays as it is:

    loss_fn = lambda lora: loss(merge_lora(base, lora, lora_cfg), batch, ...)
    grads = jax.grad(loss_fn)(lora)

The base gets no gradient and needs no optimizer state; the reference policy of a KL is `base`
itself. What it costs: r multiplications per weight and step for the merge, against one per token
for the model, so little once a batch has many more tokens than r; the gradient of the merged
matrix is formed and projected, as in full training, where a separate low-rank branch would save
that third of the work; and one copy of the adapted weights. A search then runs at full speed.

Deviation: dropout acts on the adapter's input features for a whole batch, not for each token, as
merging has no tokens. Merging is done in float32 and rounded to the dtype of the base: in bfloat16
changes below its resolution are lost, so train adapters of a float32 copy.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float, Key, PyTree
from rlm_jax.models.config import ModelConfig, check_count
from rlm_jax.models.params import (
    Params,
    ParamSpec,
    describe,
    init_specs,
    normal_init,
    param_axes,
    zeros_init,
)
from rlm_jax.models.quantize import QuantizedMatrix

LORA_TARGETS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@struct
class Adapter:
    """What is added to one matrix [out, in]: (alpha / r) up down."""

    down: Float[Array, "r in_"]
    up: Float[Array, "out r"]


@struct
class Lora:
    """The adapters of a model: for each layer, those of its adapted matrices by name."""

    layers: tuple[dict[str, Adapter], ...]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Shape and strength of the adapters; the defaults of x1.

    dropout: rate at which input features of the adapters are left out in training (x1: 0.05).
    targets: which matrices of each layer are adapted.

    Raises:
      ValueError: a field out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self):
        check_count("rank", self.rank)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a number > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {self.targets}: accepted are some of {LORA_TARGETS}")

    @property
    def scale(self) -> float:
        """What up down is multiplied by."""
        return self.alpha / self.rank


def describe_lora(cfg: ModelConfig, lora_cfg: LoraConfig, dtype: Any = jnp.float32) -> Lora:
    """The adapters' description: a `Lora` whose leaves are `ParamSpec`."""

    def adapter(matrix: ParamSpec) -> Any:
        (rows, columns), rank = matrix.shape, lora_cfg.rank
        down_init = normal_init(1 / math.sqrt(columns))
        down: Any = ParamSpec((rank, columns), dtype, (None, matrix.axes[1]), down_init)
        up: Any = ParamSpec((rows, rank), dtype, (matrix.axes[0], None), zeros_init)
        return Adapter(down, up)

    return Lora(
        tuple(
            {name: adapter(getattr(layer, name)) for name in lora_cfg.targets}
            for layer in describe(cfg, dtype).layers
        )
    )


def init_lora(
    key: Key[Array, ""], cfg: ModelConfig, lora_cfg: LoraConfig, dtype: Any = jnp.float32
) -> Lora:
    """Draws adapters that change nothing yet."""
    return init_specs(key, describe_lora(cfg, lora_cfg, dtype))


def lora_axes(cfg: ModelConfig, lora_cfg: LoraConfig, num_shards: int = 1) -> Lora:
    """The adapters' logical axes, as `params.param_axes` gives those of the matrices they change:
    split where those are, the rank never."""

    def adapter(axes: PyTree) -> Any:
        split: Any = Adapter
        return split((None, axes[1]), (axes[0], None))

    layers = param_axes(cfg, num_shards).layers
    return Lora(
        tuple(
            {name: adapter(getattr(layer, name)) for name in lora_cfg.targets} for layer in layers
        )
    )


def merge_lora(
    params: Params, lora: Lora, lora_cfg: LoraConfig, key: Key[Array, ""] | None = None
) -> Params:
    """The adapted model: the parameters with W + (alpha / r) up down in place of each adapted W.

    Args:
      key: for dropout while training; None leaves all in.

    Raises:
      ValueError: the parameters are quantized, or have another number of layers.
    """
    if len(lora.layers) != len(params.layers):
        raise ValueError(f"adapters of {len(lora.layers)} layers, a model of {len(params.layers)}")
    layers = []
    for index, (layer, adapters) in enumerate(zip(params.layers, lora.layers, strict=True)):
        matrices = {}
        for place, (name, adapter) in enumerate(sorted(adapters.items())):
            number = index * len(LORA_TARGETS) + place
            own = None if key is None else jax.random.fold_in(key, number)
            matrices[name] = _merge(getattr(layer, name), adapter, lora_cfg, own)
        layers.append(dataclasses.replace(layer, **matrices))
    return dataclasses.replace(params, layers=tuple(layers))


def _merge(matrix: Any, adapter: Adapter, lora_cfg: LoraConfig, key: Any) -> Array:
    if isinstance(matrix, QuantizedMatrix):
        raise ValueError("quantized parameters take no adapters: quantize the merged model instead")
    down = adapter.down.astype(jnp.float32)
    if key is not None and lora_cfg.dropout > 0:
        kept = jax.random.bernoulli(key, 1 - lora_cfg.dropout, down.shape[1:])
        down = jnp.where(kept, down / (1 - lora_cfg.dropout), 0.0)
    change = adapter.up.astype(jnp.float32) @ down
    return (matrix.astype(jnp.float32) + lora_cfg.scale * change).astype(matrix.dtype)
