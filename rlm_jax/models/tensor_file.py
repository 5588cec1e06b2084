"""Safetensors files: reading one tensor at a time, and writing without holding what is written.

Reading goes through the safetensors package, which validates the header. Writing is done here,
because the package wants all tensors at once: the header needs only names and shapes, so the
tensors can follow one by one.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rlm_jax.core.files import write_whole
from rlm_jax.models.checkpoint import cast, float_dtype
from rlm_jax.models.params import name_leaves

_DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
READABLE_CODES = ("F64", "F32", "F16", "BF16")


class TensorFile:
    """An open safetensors file; `shapes` lists its tensors.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a safetensors file, or a damaged one; names the file and the cause.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such safetensors file")
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self._codes = {name: str(part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.path}: not a readable safetensors file: {error}") from None

    def read(self, name: str) -> np.ndarray:
        """A tensor as a numpy array of its own dtype; ValueError unless it is a float tensor."""
        code = self._codes[name]
        if code not in READABLE_CODES:
            raise ValueError(
                f"{self.path}: tensor {name[:80]!r} is {code}: accepted {READABLE_CODES}"
            )
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot read {name[:80]!r}: {error}") from None


def write_tree(path: Path, tree: Any, dtype: Any, metadata: Mapping[str, str]) -> None:
    """Writes the leaves of a tree under their `param_path`s; the file appears whole."""
    arrays = {name: np.asarray(array) for name, array in name_leaves(tree).items()}
    shapes = [(name, array.shape) for name, array in arrays.items()]
    with write_whole(path) as beside:
        write_tensors(beside, shapes, arrays.__getitem__, dtype, metadata)


def write_tensors(
    path: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, asking `read(name)` for one tensor after the other.

    Args:
      shapes: names and shapes, in the order in which they are written.
      dtype: float32, bfloat16 or float16, of all of them.

    Raises:
      ValueError: a value is outside of float16's range.
    """
    dtype = float_dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_CODES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes:
            array = np.asarray(read(name))
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
            narrow = cast(array, dtype)
            if dtype.name == "float16" and not np.isfinite(narrow).all():
                raise ValueError(f"{name} has values outside of float16: use bfloat16 or float32")
            file.write(np.ascontiguousarray(narrow).reshape(-1).view(np.uint8).data)
