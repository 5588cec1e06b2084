"""The device mesh: axes `("replica", "data", "model")`, always all three, of size 1 when unused.

`replica` and `data` split the batch (a replica is a slice with a slow link to the others), and
`model` splits the networks. Programs are `jax.jit` over `NamedSharding` and `jax.shard_map`.
"""

import jax
import numpy as np
from jax.sharding import Mesh

AXES = ("replica", "data", "model")
BATCH_AXES = ("replica", "data")


def make_mesh(
    replica: int = 1, data: int = -1, model: int = 1, devices: list | None = None
) -> Mesh:
    """A mesh over `devices` (default: all). At most one size may be -1: whatever is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"replica": replica, "data": data, "model": model}
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size != -1 and size < 1}
    if len(free) > 1 or bad:
        raise ValueError(f"mesh sizes {sizes}: accepted are sizes >= 1, and -1 at most once")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"mesh {sizes} needs a product of {len(devices)}, the number of devices")
    shape = tuple(sizes[name] for name in AXES)
    return Mesh(np.asarray(devices).reshape(shape), AXES)
