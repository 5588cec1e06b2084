"""The replay buffer against a deque, its sampling against priorities, and its place on a mesh."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.core.mesh import make_mesh
from rlm_jax.learning.replay import add_rows, make_replay, sample_rows, update_priorities
from rlm_jax.reasoning.sharding import place_batch, shard_search

EXAMPLE = {"id": jnp.zeros((), jnp.int32), "tokens": jnp.zeros((2,), jnp.int32)}
add = jax.jit(add_rows)
update = jax.jit(update_priorities)
sample = jax.jit(sample_rows, static_argnums=2, static_argnames=("exponent", "correction"))


def make_rows(ids):
    ids = jnp.asarray(ids, jnp.int32)
    return {"id": ids, "tokens": jnp.stack([ids, -ids], -1)}


def fill(capacity, priorities):
    """A buffer whose rows, numbered from 1, have these priorities."""
    replay = make_replay(EXAMPLE, capacity)
    ids = range(1, len(priorities) + 1)
    keep = jnp.ones(len(priorities), bool)
    return add(replay, make_rows(ids), keep, jnp.asarray(priorities, jnp.float32))


@settings(max_examples=20, deadline=None)
@given(
    capacity=st.sampled_from([3, 5]),
    batches=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=6),
)
def test_it_is_a_ring_that_overwrites_the_oldest(capacity, batches):
    replay, ring, number = make_replay(EXAMPLE, capacity), collections.deque(maxlen=capacity), 1
    for keep in batches:
        ids = list(range(number, number + 4))
        number += 4
        priority = np.asarray(ids, np.float32)
        replay = add(replay, make_rows(ids), jnp.asarray(keep), jnp.asarray(priority))
        ring.extend(i for i, k in zip(ids, keep, strict=True) if k)
    assert int(replay.num_rows[0]) == len(ring)
    held = np.asarray(replay.rows["id"])[: len(ring)]
    assert sorted(held.tolist()) == list(ring)
    np.testing.assert_array_equal(replay.rows["tokens"][: len(ring), 1], -held)
    np.testing.assert_array_equal(replay.priority[: len(ring)], held)
    if len(ring) == capacity:
        # The slot to be written next holds the oldest row.
        assert held[int(replay.next_slot[0])] == ring[0]


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_frequencies_follow_priorities_and_empty_slots_are_never_drawn(exponent):
    priorities = np.asarray([0.5, 4.0, 0.0, 1.5, 2.0])
    replay = fill(8, priorities)
    mass = np.where(priorities > 0, priorities, 0.0 if exponent else 1.0) ** exponent
    draws = 4096
    found = sample(replay, jax.random.key(0), draws, exponent=exponent, correction=1.0)
    counts = np.bincount(found.slots, minlength=8)
    expected = np.concatenate([mass / mass.sum(), np.zeros(3)]) * draws
    # Stratified draws keep every count within one of each end of its interval.
    np.testing.assert_allclose(counts, expected, atol=2.0)
    np.testing.assert_array_equal(found.rows["id"], np.asarray(found.slots) + 1)


def test_importance_weights_make_the_sample_unbiased():
    priorities = np.asarray([0.5, 4.0, 1.0, 1.5, 2.0])
    replay = fill(5, priorities)
    found = sample(replay, jax.random.key(1), 8192, exponent=0.6, correction=1.0)
    mass = priorities**0.6
    np.testing.assert_allclose(found.weights, (mass.min() / mass)[found.slots], rtol=1e-5)
    values = np.asarray([3.0, -1.0, 7.0, 2.0, 11.0])
    mean = (found.weights * values[found.slots]).sum() / found.weights.sum()
    assert float(mean) == pytest.approx(values.mean(), abs=0.01)
    half = sample(replay, jax.random.key(1), 64, exponent=0.6, correction=0.5)
    np.testing.assert_allclose(half.weights, np.sqrt((mass.min() / mass)[half.slots]), rtol=1e-5)
    uniform = sample(replay, jax.random.key(1), 64)
    np.testing.assert_array_equal(uniform.weights, 1.0)


def test_stratified_draws_reach_every_row_of_a_uniform_buffer():
    replay = fill(6, np.ones(6))
    for seed in range(5):
        found = sample(replay, jax.random.key(seed), 6)
        assert sorted(np.asarray(found.slots).tolist()) == list(range(6))


def test_an_empty_buffer_gives_zeros_of_weight_zero():
    replay = make_replay(EXAMPLE, 4)
    nothing = add(replay, make_rows([1, 2]), jnp.zeros(2, bool), jnp.ones(2))
    no_chance = fill(4, [0.0, 0.0])
    for empty, exponent in ((replay, 0.0), (replay, 0.6), (nothing, 1.0), (no_chance, 1.0)):
        found = sample(empty, jax.random.key(0), 3, exponent=exponent, correction=0.4)
        assert not np.asarray(found.weights).any()
        assert np.isfinite(found.weights).all()
        assert ((np.asarray(found.slots) >= 0) & (np.asarray(found.slots) < 4)).all()
        after = update(empty, found.slots, jnp.full(3, 9.0))
        if empty is not no_chance:
            assert not np.asarray(found.rows["id"]).any()
            assert not np.asarray(after.priority).any()


def test_new_rows_come_with_the_largest_priority():
    replay = add(make_replay(EXAMPLE, 4), make_rows([1, 2]), jnp.asarray([True, True]))
    np.testing.assert_array_equal(replay.priority, [1.0, 1.0, 0.0, 0.0])
    replay = update(replay, jnp.asarray([1, 1]), jnp.asarray([5.0, 3.0]))
    np.testing.assert_array_equal(replay.priority, [1.0, 5.0, 0.0, 0.0])
    replay = add(replay, make_rows([3, 4]), jnp.asarray([False, True]))
    spoiled = update(replay, jnp.asarray([0, 2]), jnp.asarray([jnp.nan, -1.0]))
    np.testing.assert_array_equal(spoiled.priority, [0.0, 5.0, 0.0, 0.0])
    np.testing.assert_array_equal(replay.priority, [1.0, 5.0, 5.0, 0.0])
    assert replay.rows["id"].tolist() == [1, 2, 4, 0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_extreme_priorities_never_draw_what_cannot_be_drawn(seed):
    rng = np.random.default_rng(seed)
    priorities = np.where(rng.random(7) < 0.5, 0.0, 10.0 ** rng.integers(-30, 30, 7))
    replay = fill(9, priorities.astype(np.float32))
    found = sample(replay, jax.random.key(seed), 32, exponent=1.0, correction=1.0)
    if priorities.any():
        assert (priorities[np.asarray(found.slots)] > 0).all()
        assert (np.asarray(found.weights) <= 1.0).all()
    assert np.isfinite(found.weights).all()


def test_a_donated_buffer_is_written_in_place():
    replay = make_replay(EXAMPLE, 64)
    rows, keep = make_rows(range(4)), jnp.ones(4, bool)
    compiled = jax.jit(add_rows, donate_argnums=0).lower(replay, rows, keep).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(replay))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_on_a_mesh_every_shard_has_a_ring_of_its_own():
    mesh = make_mesh()
    replay = make_replay(EXAMPLE, 3, num_shards=8)
    ids = jnp.arange(1, 33)
    keys = jax.random.split(jax.random.key(0), 8)

    def step(_, replay, rows, keep, keys):
        replay = add_rows(replay, rows, keep)
        return replay, sample_rows(replay, keys[0], 2)

    run = jax.jit(shard_search(lambda p, keys, *rest: step(p, *rest, keys), mesh))
    keep = jnp.asarray([True, True, False, False] * 8)
    placed = place_batch(mesh, (keys, replay, make_rows(ids), keep))
    for _ in range(2):
        replay, found = run(jnp.zeros(()), *placed)
        placed = (placed[0], replay, *placed[2:])
    assert replay.num_rows.tolist() == [3] * 8
    assert replay.next_slot.tolist() == [1] * 8
    for shard in range(8):
        own = {4 * shard + 1, 4 * shard + 2}
        assert set(replay.rows["id"][3 * shard : 3 * shard + 3].tolist()) == own
        assert set(found.rows["id"][2 * shard : 2 * shard + 2].tolist()) <= own
        alone = make_replay(EXAMPLE, 3)
        for _ in range(2):
            mine = jax.tree.map(lambda a, s=shard: a[4 * s : 4 * s + 4], make_rows(ids))
            alone = add(alone, mine, keep[:4])
        np.testing.assert_array_equal(
            sample(alone, keys[shard], 2).rows["id"], found.rows["id"][2 * shard : 2 * shard + 2]
        )


def test_bad_settings_and_rows_are_refused():
    replay = make_replay(EXAMPLE, 2)
    with pytest.raises(ValueError, match="capacity"):
        make_replay(EXAMPLE, 0)
    with pytest.raises(ValueError, match="exponent"):
        sample_rows(replay, jax.random.key(0), 1, exponent=-1.0)
    with pytest.raises(ValueError, match="num_rows"):
        sample_rows(replay, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="shard_map"):
        sample_rows(make_replay(EXAMPLE, 2, num_shards=2), jax.random.key(0), 1)
    with pytest.raises(ValueError, match="do not fit"):
        add_rows(replay, {"id": jnp.zeros(1, jnp.int32)}, jnp.ones(1, bool))
    with pytest.raises(ValueError, match="one size"):
        add_rows(replay, make_rows([1, 2]), jnp.ones(3, bool))
