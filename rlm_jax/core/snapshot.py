"""Trees of arrays to a file and back, whole or not at all.

For a running search that is to go on after a restart. A snapshot holds numbers only (an npz without
pickles): what they mean, the tree's structure, comes from the program that reads it. A few words
of JSON may lie beside them, to say what the snapshot is of.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.files import write_whole
from rlm_jax.core.types import PyTree

_NAMES, _ABOUT = "names.json", "about.json"
_BROKEN = (zipfile.BadZipFile, KeyError, EOFError, zlib.error, json.JSONDecodeError)


def save_snapshot(
    path: str | os.PathLike, tree: PyTree, about: Mapping[str, Any] | None = None
) -> None:
    """Writes every array of a tree; an older file of that name is replaced at the end, atomically.

    RNG keys and number types that numpy does not know (bfloat16) are stored as their bits.

    Args:
      about: what `read_about` is to find, in terms of JSON.
    """
    arrays, kinds = {}, []
    for place, (name, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        bits, kind = _to_bits(leaf)
        arrays[f"a{place}"] = bits
        kinds.append([jax.tree_util.keystr(name), kind])
    with write_whole(path) as beside:
        with beside.open("wb") as file:
            np.savez(file, **arrays)
        with zipfile.ZipFile(beside, "a") as archive:
            archive.writestr(_NAMES, json.dumps(kinds))
            archive.writestr(_ABOUT, json.dumps(dict(about or {})))


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """What a snapshot says of itself, without its arrays.

    Raises:
      FileNotFoundError: no such file. ValueError: the file is no snapshot.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read(_ABOUT))
    except _BROKEN as error:
        raise ValueError(f"{path} is no snapshot: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} is no snapshot: {_ABOUT} holds no object")
    return about


def load_snapshot(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Reads a tree like `like` (arrays, or ShapeDtypeStructs of `jax.eval_shape`).

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no snapshot, or one of a tree with other arrays; names the first.
    """
    named, structure = jax.tree.flatten_with_path(like)
    try:
        with zipfile.ZipFile(path) as archive:
            kinds = json.loads(archive.read(_NAMES))
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[f"a{place}"] for place in range(len(kinds))]
    except _BROKEN as error:
        raise ValueError(f"{path} is no snapshot: {error}") from None
    if len(kinds) != len(named):
        raise ValueError(f"{path} holds {len(kinds)} arrays, wanted are {len(named)}")
    leaves = []
    for (name, want), (found, kind), bits in zip(named, kinds, arrays, strict=True):
        wanted = jax.tree_util.keystr(name), str(want.dtype)
        leaf = _from_bits(bits, want.dtype) if (found, kind) == wanted else bits
        if (found, kind, leaf.shape) != (*wanted, want.shape):
            raise ValueError(
                f"{path}: {found} is {kind}{list(leaf.shape)}, wanted is "
                f"{' of '.join(wanted)}{list(want.shape)}"
            )
        leaves.append(leaf)
    return jax.tree.unflatten(structure, leaves)


def _to_bits(leaf) -> tuple[np.ndarray, str]:
    kind = str(leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), kind
    array = np.asarray(leaf)
    if array.dtype.kind not in "biufc":
        return array.view(f"u{array.dtype.itemsize}"), kind
    return array, kind


def _from_bits(bits: np.ndarray, dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(bits), impl=dtype)
    return jnp.asarray(bits if bits.dtype == dtype else bits.view(dtype))
