"""A search over a mesh: every device searches its own part of the batch, and talks to nobody.

`shard_search` puts a function of `(params, *batch)` under `jax.shard_map` that is manual over the
batch axes ("replica", "data") and leaves "model" to the partitioner. Each shard then runs its own
loops: they end when its own structures are done, no collective runs over the batch axes, and the
only ones left are the network's own, inside a model-parallel group. (The same search under a plain
sharded `jit` keeps all devices in step and gathers in every round.)

Everything in a structure and in a world has a leading dimension that is a multiple of the batch:
B itself, or B times the pages of a structure. Splitting that dimension splits the structures, pages
and all. Page numbers count from the start of a shard's own pool, so the functions that make a
world, grow it and read it are all called through `shard_search` with one mesh:

    mesh = make_mesh(replica=1, data=4, model=2)
    params = place_params(mesh, lm, policy=param_axes(cfg, mesh.shape["model"]))
    begin_fn = jax.jit(shard_search(begin_batch, mesh)).lower(params, ...).compile()
    structure, world = abstract_outputs(begin_fn)
    search_fn = jax.jit(shard_search(search, mesh), donate_argnums=2)
    search_fn = search_fn.lower(params, keys, world, structure).compile()

Results do not depend on the mesh: a problem's randomness is its key, and neighbours are not seen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlm_jax.core.mesh import BATCH_AXES
from rlm_jax.core.sharding import TENSOR_PARALLEL, Rules, shard_tree
from rlm_jax.core.types import PyTree

BATCH_SPEC = PartitionSpec(BATCH_AXES)


def shard_search(fn: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """`fn(params, *batch) -> batch` with the batch split over ("replica", "data").

    Args:
      fn: sees `params` whole (their "model" axis is the partitioner's affair) and of each array of
        `batch` the shard's own rows; all it returns is batch arrays too. The first array of
        `batch` says what B is; a number that all shards share goes with `params`, as in
        `shard_search(lambda p, *batch: fn(*p, *batch), mesh)((params, number), ...)`. Works under
        `jax.jit` alone, as any `shard_map` that leaves an axis to the partitioner.
      mesh: with the axes of `core.mesh`.

    Returns:
      A function of the same arguments and results, to be jitted. It raises ValueError, when traced,
      for a batch that the shards do not divide and for an array that is not of the batch.
    """
    num_shards = count_shards(mesh)

    def sharded(params: PyTree, *batch: PyTree) -> PyTree:
        _check_batch(batch, mesh, num_shards)
        run = jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=(PartitionSpec(), *(BATCH_SPEC for _ in batch)),
            out_specs=BATCH_SPEC,
            axis_names=set(BATCH_AXES),
        )
        return run(params, *batch)

    return sharded


def count_shards(mesh: Mesh) -> int:
    """Parts that a batch is split into: replica * data."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def place_batch(mesh: Mesh, tree: PyTree) -> PyTree:
    """Puts batch arrays where `shard_search` wants them: split over the batch axes."""
    return jax.device_put(tree, NamedSharding(mesh, BATCH_SPEC))


def place_params(
    mesh: Mesh, params: PyTree, rules: Rules = TENSOR_PARALLEL, **axes: PyTree
) -> PyTree:
    """Puts a struct of parameters on the mesh: whole on every device, but for the fields in `axes`.

    Args:
      params: a `@struct`, such as `LanguageModel`.
      axes: by field, the logical axes of its parameters, as `core.sharding.shard_tree` takes them:
        `place_params(mesh, lm, policy=param_axes(cfg, num_shards))`.
    """
    rest = dataclasses.replace(params, **dict.fromkeys(axes))
    rest = jax.device_put(rest, NamedSharding(mesh, PartitionSpec()))
    split = {name: shard_tree(mesh, getattr(params, name), axes[name], rules) for name in axes}
    return dataclasses.replace(rest, **split)


def abstract_outputs(compiled: Any) -> PyTree:
    """What a compiled program returns, as shapes with their shardings and layouts.

    A second program that is lowered with these takes the first one's results as they lie.
    """
    return jax.tree.map(
        lambda info, layout: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=layout),
        compiled.out_info,
        compiled.output_formats,
    )


def _check_batch(batch: tuple, mesh: Mesh, num_shards: int) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    size = None
    for path, leaf in leaves:
        rows = np.shape(leaf)[0] if np.ndim(leaf) else 0
        size = rows if size is None else size
        if not rows or rows % size:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"batch argument {name} has shape {np.shape(leaf)}: its first dimension must be "
                f"the batch of {size or 'at least 1'}, or a multiple of it"
            )
    if size is None or size % num_shards:
        shards = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(f"a batch of {size} cannot be split over {shards} = {num_shards} shards")
