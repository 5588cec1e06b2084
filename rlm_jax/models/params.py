"""The parameter pytree and its one description: shape, dtype, logical axes and initializer.

`describe(cfg)` is a pytree of `ParamSpec` in exactly the layout of the parameters. Initialisation,
abstract shapes (for ahead-of-time compiles) and logical axes (for sharding) are all maps over it,
so they cannot disagree. Weights are stored [out, in], as Hugging Face stores them and as few-row
products run fastest on CPU; layers are a tuple, because a scan over stacked weights copies each
layer's slice while decoding.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float, Key, PyTree
from rlm_jax.models.config import ModelConfig

Initializer = Callable[[Array, tuple[int, ...], Any], Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: `axes` names each dimension ("vocab", "embed", "heads", "kv_heads", "ffn")
    or is None where it is never split; `init(key, shape, dtype)` makes the first value."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    init: Initializer


@struct
class Layer:
    """One transformer layer; fields that the model does not use are None."""

    attn_norm: Float[Array, "D"]
    wq: Float[Array, "HE D"]
    wk: Float[Array, "GE D"]
    wv: Float[Array, "GE D"]
    wo: Float[Array, "D HE"]
    mlp_norm: Float[Array, "D"]
    w_gate: Float[Array, "F D"]
    w_up: Float[Array, "F D"]
    w_down: Float[Array, "D F"]
    bq: Float[Array, "HE"] | None = None
    bk: Float[Array, "GE"] | None = None
    bv: Float[Array, "GE"] | None = None
    q_norm: Float[Array, "E"] | None = None
    k_norm: Float[Array, "E"] | None = None
    post_attn_norm: Float[Array, "D"] | None = None
    post_mlp_norm: Float[Array, "D"] | None = None


@struct
class Params:
    """A language model's parameters; `lm_head` is None when it is tied to `embed`.

    `quantize.QuantizedMatrix` (for inference) or `mixed.RoundedMatrix` may stand in for a matrix.
    """

    embed: Float[Array, "V D"]
    layers: tuple[Layer, ...]
    final_norm: Float[Array, "D"]
    lm_head: Float[Array, "V D"] | None = None


def describe(cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The parameters' description: a `Params` whose leaves are `ParamSpec`."""
    vocab, width = cfg.vocab_size, cfg.model_dim
    table: Any = ParamSpec(
        (vocab, width), dtype, ("vocab", "embed"), normal_init(1 / math.sqrt(width))
    )
    return Params(
        embed=table,
        layers=tuple(_describe_layer(cfg, dtype) for _ in range(cfg.num_layers)),
        final_norm=_norm_spec(cfg, width, dtype),
        lm_head=None if cfg.tie_embeddings else table,
    )


def _describe_layer(cfg: ModelConfig, dtype: Any) -> Layer:
    width, ffn = cfg.model_dim, cfg.ffn_dim
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    # The residual stream is a sum of 2L outputs: each starts smaller, so that the sum does not.
    residual = 1 / math.sqrt(2 * cfg.num_layers)

    def matrix(rows: int, columns: int, axes: tuple[str, str], gain: float = 1.0) -> Any:
        return ParamSpec((rows, columns), dtype, axes, normal_init(gain / math.sqrt(columns)))

    def bias(size: int, axis: str) -> Any:
        return ParamSpec((size,), dtype, (axis,), zeros_init) if cfg.qkv_bias else None

    return Layer(
        attn_norm=_norm_spec(cfg, width, dtype),
        wq=matrix(queries, width, ("heads", "embed")),
        wk=matrix(keys, width, ("kv_heads", "embed")),
        wv=matrix(keys, width, ("kv_heads", "embed")),
        wo=matrix(width, queries, ("embed", "heads"), residual),
        mlp_norm=_norm_spec(cfg, width, dtype),
        w_gate=matrix(ffn, width, ("ffn", "embed")),
        w_up=matrix(ffn, width, ("ffn", "embed")),
        w_down=matrix(width, ffn, ("embed", "ffn"), residual),
        bq=bias(queries, "heads"),
        bk=bias(keys, "kv_heads"),
        bv=bias(keys, "kv_heads"),
        q_norm=_norm_spec(cfg, cfg.head_dim, dtype) if cfg.qk_norm else None,
        k_norm=_norm_spec(cfg, cfg.head_dim, dtype) if cfg.qk_norm else None,
        post_attn_norm=_norm_spec(cfg, width, dtype) if cfg.post_norms else None,
        post_mlp_norm=_norm_spec(cfg, width, dtype) if cfg.post_norms else None,
    )


def _norm_spec(cfg: ModelConfig, size: int, dtype: Any) -> Any:
    return ParamSpec((size,), dtype, (None,), zeros_init if cfg.norm_offset else ones_init)


def normal_init(scale: float) -> Initializer:
    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


def zeros_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.zeros(shape, dtype)


def ones_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.ones(shape, dtype)


def init_specs(key: Key[Array, ""], specs: PyTree) -> PyTree:
    """Draws every parameter of a description; each one's randomness follows its own path, so
    adding or removing parameters leaves the others as they were."""

    def draw(path: Any, spec: ParamSpec) -> Array:
        number = zlib.crc32(param_path(path).encode()) & 0x7FFFFFFF
        return spec.init(jax.random.fold_in(key, number), spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, specs)


def init_params(key: Key[Array, ""], cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Draws a model's parameters (normal, 1/sqrt(fan-in); residual outputs smaller by sqrt(2L))."""
    return init_specs(key, describe(cfg, dtype))


def abstract_params(cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`, for `lower` and `eval_shape` without memory."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), describe(cfg, dtype))


def param_axes(cfg: ModelConfig, num_shards: int = 1) -> Params:
    """The parameters' logical axes: a `Params` with a tuple of names in each parameter's place
    (`core.sharding.shard_tree` takes it; a tuple is a pytree, so flatten up to the parameters).

    Args:
      num_shards: ways the model is split. Heads that it does not divide are named None and stay
        whole: nine heads of 64 would be cut in half by two, and every layer would pay for it.
    """
    counts = {"heads": cfg.num_heads, "kv_heads": cfg.num_kv_heads}

    def names(spec: ParamSpec) -> tuple[str | None, ...]:
        return tuple(
            None if axis and counts.get(axis, num_shards) % num_shards else axis
            for axis in spec.axes
        )

    return jax.tree.map(names, describe(cfg))


def param_path(path: Any) -> str:
    """A jax key path as the dotted name that checkpoints use: "embed", "layers.3.wq"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def name_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their `param_path`, in the tree's order."""
    return {param_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def count_params(cfg: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(describe(cfg)))
