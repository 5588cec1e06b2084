"""A checkpoint of any format, seen the same way: a config, and tensors read one at a time by name.

`gguf.py` and `hf.py` open their formats as a `Checkpoint`; loading into parameters and writing
another format are then one function each, and neither holds more than one tensor beside its result.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params, describe, param_path

MAX_NAMED = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint; parameter names are `param_path`s ("embed", "layers.3.wq").

    source: the file or folder it comes from.
    shape_of: a parameter's shape, or None when the checkpoint has no such tensor.
    read: a parameter as a numpy array, [out, in] and in this package's conventions.
    metadata: the format's own description (GGUF key-values, or config.json).
    """

    cfg: ModelConfig
    source: Path
    shape_of: Callable[[str], tuple[int, ...] | None]
    read: Callable[[str], np.ndarray]
    metadata: dict[str, Any]


def check_shapes(checkpoint: Checkpoint) -> None:
    """Compares the checkpoint's tensors with what its config describes.

    Raises:
      ValueError: tensors are missing or have other shapes; names the source and the first few.
    """
    problems = []
    for name, shape in described_shapes(checkpoint.cfg):
        found = checkpoint.shape_of(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif found != shape:
            problems.append(f"{name} is {list(found)}, expected {list(shape)}")
        if len(problems) > MAX_NAMED:
            break
    if problems:
        more = " ..." if len(problems) > MAX_NAMED else ""
        raise ValueError(f"{checkpoint.source}: {'; '.join(problems[:MAX_NAMED])}{more}")


def described_shapes(cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of a model, in the pytree's order."""
    for path, spec in jax.tree_util.tree_flatten_with_path(describe(cfg))[0]:
        yield param_path(path), spec.shape


def load_params(checkpoint: Checkpoint, dtype: Any = jnp.float32) -> Params:
    """Reads all parameters into device arrays of `dtype`, one tensor at a time."""
    dtype = float_dtype(dtype)
    check_shapes(checkpoint)

    def load(path: Any, _: Any) -> jax.Array:
        return jnp.array(cast(checkpoint.read(param_path(path)), dtype))

    return jax.tree_util.tree_map_with_path(load, describe(checkpoint.cfg))


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`; values beyond its range become infinite, without a warning."""
    with np.errstate(all="ignore"):
        return array.astype(dtype, copy=False)


def round_significand(array: np.ndarray, num_bits: int) -> np.ndarray:
    """The nearest numbers whose significands have `num_bits` bits, the leading one among them.

    Args:
      array: any shape, of a float dtype; the result is float32.
    """
    fraction, exponent = np.frexp(array.astype(np.float32))
    return np.ldexp(np.rint(np.ldexp(fraction, num_bits)), exponent - num_bits)


def float_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16" (or their jax equivalents).

    Raises:
      ValueError: it is another one.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in FLOAT_DTYPES:
        names = tuple(str(d) for d in FLOAT_DTYPES)
        raise ValueError(f"dtype {dtype!r} is not supported: accepted {names}")
    return found


FLOAT_DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16"))


def existing_path(path: str | os.PathLike[str], what: str) -> Path:
    """`path` as a Path; FileNotFoundError names `what` is missing."""
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"{found}: no such {what}")
    return found
