"""Logical axes to mesh axes: sharding as data.

A parameter names its axes by what they are ("heads", "ffn", ...); a rule says which mesh axis
each of them is split over. Tensor parallelism is the default rule set, FSDP another one.
"""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlm_jax.core.mesh import BATCH_AXES
from rlm_jax.core.types import PyTree

Rules = Mapping[str, str | tuple[str, ...] | None]

TENSOR_PARALLEL: Rules = {
    "batch": BATCH_AXES,
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "ffn": "model",
    "embed": None,
}
FSDP: Rules = {**TENSOR_PARALLEL, "embed": "data"}


def partition_spec(axes: Sequence[str | None], rules: Rules = TENSOR_PARALLEL) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are called `axes`.

    Raises:
      ValueError: an axis has no rule, or two dimensions would use one mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"no sharding rule for {unknown}; known axes are {sorted(rules)}")
    mapped = [None if axis is None else rules[axis] for axis in axes]
    used = [
        name
        for entry in mapped
        if entry
        for name in ((entry,) if isinstance(entry, str) else entry)
    ]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} map twice to one mesh axis: {mapped}")
    return PartitionSpec(*mapped)


def fits(mesh: Mesh, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """`spec` without the entries whose mesh size does not divide the dimension."""
    kept = []
    for size, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        kept.append(entry if size % ways == 0 else None)
    return PartitionSpec(*kept)


def shard_tree(mesh: Mesh, tree: PyTree, axes: PyTree, rules: Rules = TENSOR_PARALLEL) -> PyTree:
    """Places `tree` on `mesh`; `axes` mirrors it with a tuple of axis names per array.

    A dimension that its mesh axis does not divide (three KV heads over two devices) stays whole.
    """

    def place(array: jax.Array, names: tuple) -> jax.Array:
        spec = fits(mesh, partition_spec(names, rules), array.shape)
        return jax.device_put(array, NamedSharding(mesh, spec))

    leaves, treedef = jax.tree.flatten(tree)
    names = treedef.flatten_up_to(axes)
    return treedef.unflatten([place(a, n) for a, n in zip(leaves, names, strict=True)])
