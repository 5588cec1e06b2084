"""A replay buffer on the device: what searches produced, kept for later updates.

One idea: the buffer is a frozen pytree of fixed shape and four pure functions of it, so that it
can be carried through a compiled search-and-train step, donated, and stored in a checkpoint like
any other state. Rows are whatever pytree the training batch is made of; new ones overwrite the
oldest (a ring).

Sampling is proportional to priority^exponent with stratified draws and importance weights (Schaul
et al. 2015, arXiv 1511.05952); exponent 0 is uniform replay, every row with weight 1. Deviations
from the paper: a cumulative sum over all priorities and a bisection stand for its sum-tree (one
pass over `capacity` numbers a batch, and nothing to keep up to date); weights are scaled by the
largest any row of the buffer could have, not by that of the sample, so that a row's weight does not
depend on its neighbours; priorities are taken as given, and what is not above 0 (NaN included) is
never drawn, but for exponent 0, which is uniform: add a small constant where 0 must not mean never.

Sharded over a mesh the buffer is one ring a shard: `make_replay(..., num_shards=n)` lays them side
by side, and every array's leading dimension splits over the batch axes, so that inside
`reasoning.sharding.shard_search` each shard adds to and samples from its own rows, with a key of
its own and without collectives.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, Key, PyTree, Shaped


@struct
class Replay:
    """Rings of rows side by side, one a shard; the functions below see one.

    rows: pytree of [slots, ...], slots = shards * capacity. priority: of each row, >= 0. next_slot:
    of each ring, where the next row goes. num_rows: of each ring, rows in it; they are the first
    ones until the ring is full.
    """

    rows: PyTree
    priority: Float32[Array, "slots"]
    next_slot: Int32[Array, "rings"]
    num_rows: Int32[Array, "rings"]


@struct
class ReplaySample:
    """n rows out of a buffer.

    slots: where they lie, for `update_priorities`. weights: importance weights in (0, 1], to be
    multiplied into the loss's; all 0 when the buffer is empty.
    """

    rows: PyTree
    slots: Int32[Array, "n"]
    weights: Float32[Array, "n"]


def make_replay(example: PyTree, capacity: int, num_shards: int = 1) -> Replay:
    """An empty buffer.

    Args:
      example: one row, or its shapes and dtypes (`jax.ShapeDtypeStruct`).
      capacity: rows of each shard.

    Raises:
      ValueError: capacity or num_shards is below 1.
    """
    if capacity < 1 or num_shards < 1:
        raise ValueError(f"capacity and num_shards must be >= 1, got {capacity}, {num_shards}")

    def room(leaf: Array | jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros((num_shards * capacity, *leaf.shape), leaf.dtype)

    return Replay(
        rows=jax.tree.map(room, example),
        priority=jnp.zeros(num_shards * capacity, jnp.float32),
        next_slot=jnp.zeros(num_shards, jnp.int32),
        num_rows=jnp.zeros(num_shards, jnp.int32),
    )


def add_rows(
    replay: Replay,
    rows: PyTree,
    keep: Bool[Array, "R"],
    priority: Shaped[Array, "R"] | None = None,
) -> Replay:
    """Writes those of R new rows that are to be kept, in order, over the oldest.

    Args:
      rows: leaves of [R, ...]. keep: which of them are real.
      priority: None gives each the largest in the buffer (1 in an empty one), so that nothing new
        waits for its first turn.

    Raises:
      ValueError: for a buffer of several rings outside of shard_map, or rows of other shapes.
    """
    capacity = _check_one_ring(replay)
    _check_rows(replay.rows, rows, keep.shape[0])
    count = jnp.cumsum(keep.astype(jnp.int32))
    total = count[-1]
    # Of more rows than fit, the last ones: each slot is written once.
    written = keep & (count > total - capacity)
    slots = jnp.where(written, (replay.next_slot[0] + count - 1) % capacity, capacity)
    if priority is None:
        largest = jnp.where(_is_used(replay), replay.priority, 0.0).max()
        new = jnp.where(replay.num_rows[0] > 0, largest, 1.0)
        priority = jnp.where(keep, new, 0.0)
    priority = jnp.where(keep, _clean(priority), 0.0)

    def write(old: Array, new: Array) -> Array:
        return old.at[slots].set(new.astype(old.dtype), mode="drop")

    return Replay(
        rows=jax.tree.map(write, replay.rows, rows),
        priority=write(replay.priority, priority),
        next_slot=(replay.next_slot + total) % capacity,
        num_rows=jnp.minimum(replay.num_rows + total, capacity),
    )


def sample_rows(
    replay: Replay,
    key: Key[Array, ""],
    num_rows: int,
    *,
    exponent: float = 0.0,
    correction: float = 1.0,
) -> ReplaySample:
    """Draws rows with replacement, row i with probability p_i^exponent / sum p^exponent.

    The draws are stratified: one from each of `num_rows` equal parts of the probability. An empty
    buffer gives rows of zeros with weight 0, so that losses and counts of such a batch are 0; so
    does one whose priorities are all 0, with an exponent above 0.

    Args:
      exponent: 0 is uniform; the paper's proportional variant uses 0.6.
      correction: beta of the weights (P_least / P_i)^beta; the paper anneals it from 0.4 to 1,
        where the weighted sample is unbiased up to a constant.

    Raises:
      ValueError: fewer than one row, a negative exponent, or several rings outside of shard_map.
    """
    if num_rows < 1 or exponent < 0:
        raise ValueError(f"num_rows >= 1 and exponent >= 0 wanted, got {num_rows}, {exponent}")
    _check_one_ring(replay)
    mass = jnp.where(_is_used(replay), replay.priority**exponent, 0.0)
    ends = jnp.cumsum(mass)
    total = ends[-1]
    noise = jax.random.uniform(key, (num_rows,))
    places = (jnp.arange(num_rows) + noise) / num_rows * total
    # Rounding may put a place at the very end, behind the last row that has any probability.
    last = jnp.argmax(ends >= total).astype(jnp.int32)
    slots = jnp.minimum(_first_above(ends, places), last)
    least = jnp.where(mass > 0, mass, jnp.inf).min()
    # Sums are rounded in an order of their own, so a place may just fall on a slot without mass.
    drawn = mass[slots]
    share = least / jnp.where(drawn > 0, drawn, 1.0)
    weights = jnp.where(drawn > 0, share**correction, 0.0)
    return ReplaySample(jax.tree.map(lambda leaf: leaf[slots], replay.rows), slots, weights)


def update_priorities(
    replay: Replay, slots: Int32[Array, "n"], priority: Float[Array, "n"]
) -> Replay:
    """New priorities of sampled rows; of a row that was sampled twice, the larger."""
    _check_one_ring(replay)
    cleared = replay.priority.at[slots].set(0.0)
    raised = cleared.at[slots].max(_clean(priority))
    # An empty buffer was sampled at slots that hold nothing.
    raised = jnp.where(_is_used(replay), raised, replay.priority)
    return dataclasses.replace(replay, priority=raised)


def _clean(priority: Array) -> Array:
    """One NaN would make every later sum one."""
    return jnp.where(priority > 0, priority.astype(jnp.float32), 0.0)


def _first_above(ends: Float32[Array, "slots"], places: Float32[Array, "n"]) -> Int32[Array, "n"]:
    """The first slot whose end lies above each place, by bisection.

    (`jnp.searchsorted` of jax 0.10 cannot be traced in shard_map.)
    """
    low = jnp.zeros_like(places, dtype=jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        above = ends[jnp.minimum(middle, ends.shape[0] - 1)] > places
        return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

    steps = ends.shape[0].bit_length()
    return jax.lax.fori_loop(0, steps, halve, (low, low + ends.shape[0]))[0]


def _is_used(replay: Replay) -> Bool[Array, "slots"]:
    return jnp.arange(replay.priority.shape[0]) < replay.num_rows[0]


def _check_one_ring(replay: Replay) -> int:
    rings = replay.next_slot.shape[0]
    if rings != 1:
        raise ValueError(
            f"a replay buffer of {rings} shards is used inside shard_map, a shard each"
        )
    return replay.priority.shape[0]


def _check_rows(old: PyTree, new: PyTree, num_rows: int) -> None:
    wanted = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(old)]
    found = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(new)]
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(new)}
    if jax.tree.structure(old) != jax.tree.structure(new) or wanted != found:
        raise ValueError(f"rows of {found} do not fit a replay buffer of {wanted}")
    if sizes != {num_rows}:
        raise ValueError(f"rows of {sorted(sizes)} with {num_rows} flags: one size wanted")
