"""A decoder-only transformer: one forward function that takes attention as a function.

Model code knows tokens, positions and weights. How keys and values are kept (not at all, in a
cache, in pages shared by a tree of steps) is the business of `attend`, which sees one layer's
rotated queries and keys and carries any state it likes. Norms, rotary embeddings and softmax run
in float32, matrix products and the residual stream in the dtype of the parameters; matrices of
`quantize.py` and `mixed.py` have products of their own.

Papers: Llama (arXiv 2302.13971), Qwen2.5 (2412.15115), Qwen3 (2505.09388), Gemma-3 (2503.19786).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Float, Float32, Int32
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.mixed import RoundedMatrix, multiply_rounded
from rlm_jax.models.params import Layer, Params
from rlm_jax.models.quantize import QuantizedMatrix, look_up, multiply_quantized, pad_rows
from rlm_jax.models.rope import RopeTable, apply_rope, rope_tables

Matrix = Array | QuantizedMatrix | RoundedMatrix

# Where XLA on CPU gains from another form of a product: rows, and weights of one row's.
_FEW_ROWS = 256
_SMALL_WEIGHTS = 1 << 19

# attend(layer, q [R,T,H,E], k [R,T,G,E], v [R,T,G,E], state) -> (out [R,T,H,E], state); the layer
# index is a Python int; q and k are rotated, q is not scaled yet (`attention.scores_scale`).
Attend = Callable[[int, Array, Array, Array, Any], tuple[Array, Any]]


@jax.named_scope("transformer")
def forward(
    params: Params,
    tokens: Int32[Array, "R T"],
    positions: Int32[Array, "R T"],
    *,
    cfg: ModelConfig,
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "R T D"], Any]:
    """Runs the layers over `tokens` at `positions`.

    Returns:
      The hidden states after the final norm (`unembed` makes logits of them), and the state that
      the last call of `attend` returned.
    """
    x = look_up(params.embed, tokens, params.final_norm.dtype)
    if cfg.embed_scale != 1.0:
        x = x * jnp.asarray(cfg.embed_scale, x.dtype)
    return forward_embedded(params, x, positions, cfg=cfg, attend=attend, state=state)


def forward_embedded(
    params: Params,
    x: Float[Array, "R T D"],
    positions: Int32[Array, "R T"],
    *,
    cfg: ModelConfig,
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "R T D"], Any]:
    """`forward` of tokens that are embedded already, as one may be that has no row in the table."""
    tables = rope_tables(cfg, positions)
    for index, layer in enumerate(params.layers):
        rope = tables[cfg.layer_has_local_rope(index)]
        x, state = _attention_block(index, layer, x, rope, cfg, attend, state)
        x = _mlp_block(layer, x, cfg)
    return rms_norm(x, params.final_norm, cfg), state


@jax.named_scope("unembed")
def unembed(
    params: Params, hidden: Float[Array, "*rows D"], *, cfg: ModelConfig
) -> Float32[Array, "*rows V"]:
    """Logits of hidden states (after the final norm), in float32, soft-capped if the model is."""
    head = params.embed if params.lm_head is None else params.lm_head
    return softcap(linear(hidden, head, out_dtype=jnp.float32), cfg.logit_softcap)


def linear(x: Array, w: Matrix, *, out_dtype: Any = None) -> Array:
    """x [..., in] times w [out, in], in the dtype of `x` unless told otherwise.

    Hardware accumulates in float32 either way; a narrower result keeps the all-reduce of a split
    product narrow too, so only logits ask for float32. XLA's CPU backend multiplies few rows
    faster as columns, one row by a small matrix faster in two halves, one per core, and bfloat16
    many times faster where float32 comes out (docs/design/002-decode-speed.md); elsewhere the
    product is left to the compiler.
    """
    dtype = out_dtype or x.dtype
    if isinstance(w, QuantizedMatrix):
        return multiply_quantized(x, w, out_dtype=dtype)
    if isinstance(w, RoundedMatrix):
        return multiply_rounded(x, w).astype(dtype)
    num_rows = math.prod(x.shape[:-1])
    plain = functools.partial(_multiply_rows, out_dtype=dtype)
    if num_rows == 1 and w.size < _SMALL_WEIGHTS and w.shape[0] % 2 == 0:
        on_cpu = _multiply_halves
    elif 1 < num_rows <= _FEW_ROWS:
        on_cpu = _multiply_columns
    elif num_rows > 1 and x.dtype == w.dtype == jnp.bfloat16:
        on_cpu = _multiply_wide
    else:
        return plain(x, w)
    cpu = functools.partial(on_cpu, out_dtype=dtype)
    return jax.lax.platform_dependent(x, w, cpu=cpu, default=plain)


def _multiply_rows(x: Array, w: Array, *, out_dtype: Any) -> Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=out_dtype)


def _multiply_columns(x: Array, w: Array, *, out_dtype: Any) -> Array:
    count = math.prod(x.shape[:-1])
    out = _multiply_rows(w, pad_rows(x.reshape(count, -1)), out_dtype=jnp.float32)
    # Without the barrier the compiler folds the transpose back into the product.
    out = jax.lax.optimization_barrier(out)[:, :count].T
    return out.astype(out_dtype).reshape(*x.shape[:-1], -1)


def _multiply_wide(x: Array, w: Array, *, out_dtype: Any) -> Array:
    return _multiply_rows(x, w, out_dtype=jnp.float32).astype(out_dtype)


def _multiply_halves(x: Array, w: Array, *, out_dtype: Any) -> Array:
    halves = w.reshape(2, -1, w.shape[1])
    twice = jnp.broadcast_to(x.reshape(-1), (2, w.shape[1]))
    contract = (((2,), (1,)), ((0,), (0,)))
    out = jax.lax.dot_general(halves, twice, contract, preferred_element_type=out_dtype)
    return out.reshape(*x.shape[:-1], -1)


def softcap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), or `x` when there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rms_norm(x: Array, weight: Array, cfg: ModelConfig) -> Array:
    """RMSNorm over the last dimension, in float32; Gemma multiplies by 1 + weight before rounding,
    the other families by weight after it."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(square + cfg.norm_eps)
    if cfg.norm_offset:
        return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * weight


def _attention_block(
    index: int,
    layer: Layer,
    x: Array,
    rope: RopeTable,
    cfg: ModelConfig,
    attend: Attend,
    state: Any,
) -> tuple[Array, Any]:
    normed = rms_norm(x, layer.attn_norm, cfg)
    q = _project_heads(normed, layer.wq, layer.bq, cfg.num_heads)
    k = _project_heads(normed, layer.wk, layer.bk, cfg.num_kv_heads)
    v = _project_heads(normed, layer.wv, layer.bv, cfg.num_kv_heads)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, cfg), rms_norm(k, layer.k_norm, cfg)
    out, state = attend(index, apply_rope(q, rope), apply_rope(k, rope), v, state)
    out = linear(out.astype(x.dtype).reshape(*x.shape[:2], -1), layer.wo)
    if layer.post_attn_norm is not None:
        out = rms_norm(out, layer.post_attn_norm, cfg)
    return x + out, state


def _project_heads(x: Array, w: Matrix, bias: Array | None, num_heads: int) -> Array:
    out = linear(x, w)
    if bias is not None:
        out = out + bias
    return out.reshape(*x.shape[:2], num_heads, -1)


def _mlp_block(layer: Layer, x: Array, cfg: ModelConfig) -> Array:
    normed = rms_norm(x, layer.mlp_norm, cfg)
    gate = linear(normed, layer.w_gate).astype(jnp.float32)
    act = jax.nn.silu(gate) if cfg.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    out = linear(act.astype(x.dtype) * linear(normed, layer.w_up), layer.w_down)
    if layer.post_mlp_norm is not None:
        out = rms_norm(out, layer.post_mlp_norm, cfg)
    return x + out
