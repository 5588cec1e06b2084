"""Eight-bit inference (W8A8): int8 weights, activations rounded to int8 row by row as they come.

Every weight matrix, the embedding table too, becomes a `QuantizedMatrix`: integers in [-127, 127]
and one float32 scale per output channel (for the table: per token). A product rounds each row of
its input by that row's largest magnitude, multiplies int8 by int8 into int32, which is exact, and
rescales.

The one idea: a few input channels are 10 to 20 times larger than the rest, and one of them takes
the levels from all others of its row. So both sides are first turned by the same Hadamard matrix,
block by block: x w' = (x H) (w H)', where no channel stands out. It needs no data, no change to
the rest of the model, and commutes with any split of the inputs into whole blocks. Rounding an
input depends on the input alone, so products that share one (query, key and value; gate and up)
share its rotation and rounding. Norms and biases stay as they are, and so do attention and the
caches. What it does to log-probabilities, accuracy and speed: docs/design/003-int8.md.

Papers: LLM.int8() (arXiv 2208.07339), its "vector-wise" quantization without the float16 part for
outliers; QuaRot (2404.00456), whose rotations are folded into the weights of neighbouring layers
where ours are applied to each input, which spares one case per family. For inference: rounding has
no useful gradient.
"""

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float, Float32, Int8, Int32, PyTree
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params, describe, param_axes

QUANTIZATIONS = ("int8",)

LEVELS = 127
BLOCK_CHANNELS = 64
# Below it, a row is rounded more coarsely instead of dividing by nearly nothing.
_LEAST_MAGNITUDE = 1e-30
_LEAST_ROWS_ON_CPU = 4
# What int8 becomes uint8 by.
_OFFSET = 128
_PROCESSOR = pathlib.Path("/proc/cpuinfo")


@struct
class QuantizedMatrix:
    """A weight matrix [out, in]: row r is scale[r] * values[r], rotated back (`rotate`).

    sums: of each row's values; what products of unsigned inputs are corrected by.
    """

    values: Int8[Array, "out in_"]
    scale: Float32[Array, "out"]
    sums: Int32[Array, "out"]


def check_quantization(name: str | None) -> None:
    """Refuses what is neither None nor one of `QUANTIZATIONS`.

    Raises:
      ValueError: names it and what is accepted.
    """
    if name is not None and name not in QUANTIZATIONS:
        accepted = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantize {name!r}: accepted are {accepted} or None")


def quantize_params(params: Params, cfg: ModelConfig) -> Params:
    """The same model with its matrices in int8 (a pure function, traceable).

    Raises:
      ValueError: it is quantized already.
    """
    if isinstance(params.embed, QuantizedMatrix):
        raise ValueError("the parameters are quantized already")

    def quantize(spec: Any, array: Array) -> Any:
        return _quantize_matrix(array) if len(spec.shape) == 2 else array

    return jax.tree.map(quantize, describe(cfg), params)


def quantized_axes(cfg: ModelConfig) -> Params:
    """Logical axes of `quantize_params`' result, as `params.param_axes` gives those of its input.

    A scale and a sum lie with their output channel; where inputs are split, a row's largest
    magnitude is one more (small) all-reduce.
    """

    def spread(spec: Any, axes: PyTree) -> Any:
        matrix: Any = QuantizedMatrix
        return matrix(axes, axes[:1], axes[:1]) if len(spec.shape) == 2 else axes

    return jax.tree.map(spread, describe(cfg), param_axes(cfg))


def rotate(x: Float[Array, "*rows in_"]) -> Float32[Array, "*rows in_"]:
    """Each block of channels times an orthonormal Hadamard matrix; twice is the identity.

    Blocks have 64 channels, or the largest power of two that divides the channels.
    """
    size = math.gcd(x.shape[-1], BLOCK_CHANNELS)
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)
    # Signs alone are exact in the bfloat16 passes of a TPU's product.
    mixed = jnp.matmul(blocks, _hadamard_signs(size), precision=jax.lax.Precision.HIGHEST)
    return (mixed * size**-0.5).reshape(x.shape)


def _hadamard_signs(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix, symmetric."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


@jax.jit
def _quantize_matrix(matrix: Array) -> QuantizedMatrix:
    values, scale = quantize_rows(rotate(matrix))
    return QuantizedMatrix(values, scale, values.sum(1, dtype=jnp.int32))


def quantize_rows(
    x: Float[Array, "*rows in_"],
) -> tuple[Int8[Array, "*rows in_"], Float32[Array, "*rows"]]:
    """Each row as integers in [-127, 127] and the scale that brings them back, to half a scale."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.maximum(largest, _LEAST_MAGNITUDE) / LEVELS
    return jnp.round(wide * (1 / scale)[..., None]).astype(jnp.int8), scale


def multiply_quantized(
    x: Float[Array, "*rows in_"], w: QuantizedMatrix, *, out_dtype: Any
) -> Array:
    """x [..., in] times w [out, in], in `out_dtype`; rescaling is done in float32."""
    rows, scale = quantize_rows(rotate(x.reshape(-1, x.shape[-1])))
    product = multiply_integers(rows, w.values, w.sums).astype(jnp.float32)
    out = product * scale[:, None] * w.scale
    return out.astype(out_dtype).reshape(*x.shape[:-1], -1)


def multiply_integers(
    x: Int8[Array, "rows in_"], w: Int8[Array, "out in_"], sums: Int32[Array, "out"]
) -> Int32[Array, "rows out"]:
    """x times w transposed, exactly (up to 2^31 / (255 * 127) = 66,000 inputs).

    Args:
      sums: of each row of `w`.
    """
    fastest = _multiply_unsigned if cpu_prefers_unsigned() else _multiply
    on_cpu = functools.partial(_multiply_padded, fastest)
    return jax.lax.platform_dependent(x, w, sums, cpu=on_cpu, default=_multiply)


@functools.cache
def cpu_prefers_unsigned() -> bool:
    """Whether this machine's processor multiplies uint8 by int8 faster than int8 by int8.

    So it is where AVX-512 has VNNI, whose instruction takes one unsigned side, and no AMX, which
    XLA uses for either; without VNNI the unsigned product has no fast path at all.
    """
    try:
        flags = set(_PROCESSOR.read_text().split())
    except OSError:
        return False
    return "avx512_vnni" in flags and "amx_int8" not in flags


def look_up(table: Array | QuantizedMatrix, ids: Int32[Array, "*rows"], dtype: Any) -> Array:
    """Rows of an embedding table, in `dtype` where the table is quantized."""
    if not isinstance(table, QuantizedMatrix):
        return table[ids]
    return rotate(table.values[ids] * table.scale[ids][..., None]).astype(dtype)


def _multiply(x: Array, w: Array, sums: Array) -> Array:
    del sums
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.int32)


def _multiply_unsigned(x: Array, w: Array, sums: Array) -> Array:
    product = jax.lax.dot_general(
        jax.lax.bitcast_convert_type(x, jnp.uint8) ^ _OFFSET,
        w,
        (((1,), (1,)), ((), ())),
        # By default JAX widens factors of two types before XLA sees them.
        precision=jax.lax.DotAlgorithmPreset.DEFAULT,
        preferred_element_type=jnp.int32,
    )
    return product - _OFFSET * sums


def _multiply_padded(multiply: Any, x: Array, w: Array, sums: Array) -> Array:
    return multiply(pad_rows(x), w, sums)[: x.shape[0]]


def pad_rows(x: Array) -> Array:
    """x [rows, in] with rows of 0 up to four, for XLA's CPU backend.

    It has no fast product of fewer in int8 (docs/design/003-int8.md) or bfloat16 (002), and is no
    faster with two or three of float32.
    """
    return jnp.pad(x, ((0, max(0, _LEAST_ROWS_ON_CPU - x.shape[0])), (0, 0)))
