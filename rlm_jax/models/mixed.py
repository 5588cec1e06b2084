"""Mixed precision: products in bfloat16 that are summed in float32, all else as it is.

The one idea: as in `quantize.py`, another kind of matrix stands in for the plain ones, so that
model and loss do not change. A `RoundedMatrix` keeps its float32 weights, which learn; each product
rounds them and its input to bfloat16, forward and backward, and gives float32. The residual stream,
norms, softmax, embeddings looked up, optimizer and gradients stay float32.

Matrix units are made for such products: on a TPU they are what float32 ones are broken into, and a
processor with AMX does several times as many of them a second.

Paper: Micikevicius et al. 2018 (arXiv 1710.03740), without loss scaling: bfloat16 has the exponents
of float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float32
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params, describe

MATMUL_DTYPES = ("float32", "bfloat16")


@struct
class RoundedMatrix:
    """A weight matrix [out, in] whose products are taken in bfloat16."""

    weights: Float32[Array, "out in_"]


def round_products(params: Params, cfg: ModelConfig) -> Params:
    """The same model with its products in bfloat16 (a pure function, differentiable).

    Embeddings are looked up in full: rounded, a network that reads numbers in them would read
    others. So a tied output matrix becomes one of its own.
    """

    def wrap(spec: Any, array: Array) -> Any:
        return RoundedMatrix(array) if len(spec.shape) == 2 else array

    layers = jax.tree.map(wrap, describe(cfg).layers, params.layers)
    head: Any = RoundedMatrix(params.embed if params.lm_head is None else params.lm_head)
    return dataclasses.replace(params, layers=layers, lm_head=head)


def multiply_rounded(x: Float32[Array, "*rows in_"], w: RoundedMatrix) -> Array:
    """x [..., in] times w [out, in], in float32."""
    return _multiply(x, w.weights)


@jax.custom_vjp
def _multiply(x: Array, weights: Array) -> Array:
    return _forward(x, weights)[0]


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    return _product(*rounded, (x.ndim - 1,), (1,)), rounded


def _backward(rounded: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    # What comes back is rounded too; by default the product would be one of float32.
    x, weights = rounded
    change, rows = change.astype(jnp.bfloat16), tuple(range(x.ndim - 1))
    # Rows are not joined into one dimension first: XLA's CPU backend would sum over it slowly.
    return _product(change, weights, (x.ndim - 1,), (0,)), _product(change, x, rows, rows)


def _product(x: Array, y: Array, over_x: tuple[int, ...], over_y: tuple[int, ...]) -> Array:
    contract = ((over_x, over_y), ((), ()))
    return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


_multiply.defvjp(_forward, _backward)
