"""The GGUF container: key-values, tensor directory and raw tensor bytes, with every bound checked.

Read here instead of through `gguf.GGUFReader`, because that one trusts the file (a wrong array
length makes it loop without end) and takes seconds for a vocabulary; its dequantizers are used as
they are (`gguf.py`). Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
# The smallest possible key-value (8 + 1 + 4 + 1 bytes) and tensor entry (8 + 1 + 4 + 8 + 4 + 8).
MIN_VALUE_BYTES, MIN_TENSOR_BYTES = 14, 33

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

# GGML type number: name, elements a block, bytes a block.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `shape` is [out, in] order, `offset` is from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int

    @property
    def type_name(self) -> str:
        """Name of the quantisation, or "type N" when this package does not know it."""
        return TENSOR_TYPES.get(self.type_number, (f"type {self.type_number}", 0, 0))[0]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file; 0 for an unknown type."""
        _, block, size = TENSOR_TYPES.get(self.type_number, ("", 1, 0))
        return math.prod(self.shape) // block * size


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A parsed header: metadata as plain Python values, and the tensor directory."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def raw(self, entry: TensorEntry) -> np.ndarray:
        """A tensor's bytes, memory-mapped."""
        return np.memmap(self.path, np.uint8, "r", entry.offset, (entry.num_bytes,))


def read_gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key-values of a GGUF file: str, int, float, bool, list of str, or numpy array.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, or a damaged one; names the file and the cause.
    """
    return read_gguf_file(path).metadata


def read_gguf_file(path: str | os.PathLike[str]) -> GGUFFile:
    """Parses a GGUF header and checks that every tensor lies inside the file, on its own bytes.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, or a damaged one; names the file and the cause.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such GGUF file")
    if not path.is_file():
        raise ValueError(f"{path}: is not a file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: not a GGUF file ({path.stat().st_size} bytes)")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, _Cursor(data, len(data)))
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path}: damaged or unsupported GGUF file: {error}") from None


class _Cursor:
    """A position in the file whose every step is checked against the file's end."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.at = data, size, 0

    def skip(self, num_bytes: int) -> int:
        """Moves on and returns where it was."""
        start = self.at
        if num_bytes > self.size - start:
            raise ValueError(f"it ends at byte {self.size}, inside an entry at byte {start}")
        self.at = start + num_bytes
        return start

    def u32(self) -> int:
        return struct.unpack_from("<I", self.data, self.skip(4))[0]

    def u64(self) -> int:
        return struct.unpack_from("<Q", self.data, self.skip(8))[0]

    def string(self) -> str:
        start = self.skip(self.u64())
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise ValueError(f"the string at byte {start} is not UTF-8") from None

    def numbers(self, dtype: np.dtype, count: int) -> np.ndarray:
        start = self.skip(dtype.itemsize * count)
        return np.frombuffer(self.data[start : self.at], dtype)


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"magic is {cursor.data[:4]!r}, not {MAGIC!r}")
    cursor.skip(4)
    version = cursor.u32()
    if version not in VERSIONS:
        order = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{order}, accepted are {VERSIONS}")
    num_tensors, num_values = cursor.u64(), cursor.u64()
    if num_tensors * MIN_TENSOR_BYTES + num_values * MIN_VALUE_BYTES > cursor.size:
        raise ValueError(
            f"{num_tensors} tensors and {num_values} values cannot fit into {cursor.size} bytes"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, cursor.u32())
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError("one part of a split file: join the parts with llama-gguf-split --merge")
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GGUFFile(path, metadata, _place(entries, start, cursor.size))


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string()
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind], 1)[0].item()
    if kind != _ARRAY:
        raise ValueError(f"unknown value type {kind} at byte {cursor.at}")
    item, count = cursor.u32(), cursor.u64()
    if item in _SCALARS:
        return cursor.numbers(_SCALARS[item], count)
    if item != _STRING:
        raise ValueError(f"unsupported array of value type {item} at byte {cursor.at}")
    if count * 8 > cursor.size - cursor.at:
        raise ValueError(f"an array of {count} strings at byte {cursor.at} is past the end")
    return [cursor.string() for _ in range(count)]


def _read_entry(cursor: _Cursor) -> TensorEntry:
    name = cursor.string()
    dims = cursor.u32()
    if not 1 <= dims <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {dims} dimensions")
    # GGUF lists the contiguous dimension first.
    shape = tuple(cursor.u64() for _ in range(dims))[::-1]
    return TensorEntry(name, shape, cursor.u32(), cursor.u64())


def _place(entries: list[TensorEntry], start: int, size: int) -> dict[str, TensorEntry]:
    """Makes offsets absolute; refuses tensors past the end, on shared bytes or named twice."""
    tensors: dict[str, TensorEntry] = {}
    end, last = start, "the header"
    for entry in sorted(entries, key=lambda e: e.offset):
        name = entry.name[:80]
        if name in tensors:
            raise ValueError(f"tensor {name!r} occurs twice")
        _, block, _ = TENSOR_TYPES.get(entry.type_number, ("", 1, 0))
        if min(entry.shape) < 1 or entry.shape[-1] % block:
            raise ValueError(f"tensor {name!r} ({entry.type_name}) has shape {entry.shape}")
        placed = dataclasses.replace(entry, offset=start + entry.offset)
        if placed.offset + placed.num_bytes > size:
            raise ValueError(
                f"truncated: tensor {name!r} ends at byte {placed.offset + placed.num_bytes}, "
                f"the file at {size}"
            )
        if placed.offset < end:
            raise ValueError(f"tensor {name!r} overlaps {last!r}")
        end, last = placed.offset + placed.num_bytes, name
        tensors[entry.name] = placed
    return tensors
