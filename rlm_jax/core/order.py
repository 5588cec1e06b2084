"""Reading an array before it is overwritten, where only we know which comes first.

XLA lets a loop write in place what it carries, if every read of the old contents provably comes
before the write. "Provably" means that the write needs the read; barriers are gone by the time the
compiler decides. Otherwise it copies the whole array, in every turn of the loop.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Int32, Shaped


def zero_behind(read: Shaped[jax.Array, "..."]) -> Int32[jax.Array, "..."]:
    """Zeros of the shape of `read` that cannot be known before it: add one to what is written."""
    known = jnp.nan_to_num(read.astype(jnp.float32))
    return jnp.minimum(jnp.abs(known), 0.0).astype(jnp.int32)
