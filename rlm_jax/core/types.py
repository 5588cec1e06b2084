"""Array types of the package's signatures (jaxtyping), under one import.

One-letter dimensions: B structures, N nodes, K children, W leaves, S step tokens, T tokens,
V vocabulary, D model width, H query heads, G key-value heads, E head width, L layers, P pages,
F feed-forward width, R rows of a decoding batch (B*W*K).
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int8, Int32, Key, Shaped, UInt32

PyTree = Any

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Int",
    "Int8",
    "Int32",
    "Key",
    "PyTree",
    "Shaped",
    "UInt32",
]
