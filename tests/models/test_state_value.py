"""A network that judges states as sets of numbers, and its file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlm_jax.models.state_value import (
    STATE_VALUE,
    StateValueConfig,
    apply_state_value,
    asked_goal_logits,
    begin_asking,
    init_state_value,
    load_state_value,
    save_state_value,
    state_goal_logits,
    widen_numbers,
)

CFG = StateValueConfig(
    num_goals=7, num_layers=2, model_dim=16, num_heads=2, ffn_dim=24, num_numbers=32, goal_rank=8
)
ITEMS = jnp.asarray([[3, 5, 8, -1], [9, 1, -1, -1], [31, 2, 2, 7]], jnp.int32)


@pytest.fixture(scope="module")
def network():
    return init_state_value(jax.random.key(0), CFG)


@pytest.fixture(scope="module")
def asked():
    """A network that is asked about goals."""
    return init_state_value(jax.random.key(0), dataclasses.replace(CFG, readout="asked"))


@pytest.fixture(scope="module")
def judge():
    return jax.jit(state_goal_logits)


@pytest.fixture(params=["factors", "asked"])
def either(request):
    return request.getfixturevalue({"factors": "network"}.get(request.param, request.param))


def test_a_goal_is_judged_as_if_no_other_were_asked_about(asked, judge):
    """And the goals that are asked about change nothing of what is seen of the state."""
    every = np.asarray(judge(asked, ITEMS))
    assert every.shape == (3, 7)
    assert (every.std(axis=1) > 1e-3).all()
    ask = jax.jit(asked_goal_logits)
    goals = jnp.asarray([[5, 0], [2, 2], [6, 1]], jnp.int32)
    some = np.asarray(ask(asked, ITEMS, goals))
    np.testing.assert_allclose(some, np.take_along_axis(every, np.asarray(goals), 1), atol=1e-5)
    # Nor does a goal see itself asked about twice.
    np.testing.assert_allclose(
        ask(asked, ITEMS[:1], jnp.asarray([[3, 3]])), every[:1, [3, 3]], atol=1e-5
    )


def test_a_number_learns_nothing_of_being_asked_about(asked):
    ask = jax.grad(lambda network, goals: asked_goal_logits(network, ITEMS, goals).sum())
    embed = jax.jit(ask)(asked, jnp.asarray([[4, 6]] * 3)).trunk.embed
    items = {*np.asarray(ITEMS).ravel().tolist()} - {-1}
    assert set(np.flatnonzero(np.asarray(embed).any(axis=1))) == items | {CFG.num_numbers + 1}


def test_a_network_begins_to_be_asked_with_the_trunk_that_it_has(network):
    begun = begin_asking(network)
    assert begun.cfg == dataclasses.replace(CFG, readout="asked")
    jax.tree.map(np.testing.assert_array_equal, begun.trunk, network.trunk)
    assert not np.asarray(jax.jit(state_goal_logits)(begun, ITEMS)).any()
    assert begin_asking(begun) is begun


def test_a_state_is_a_set(either, judge):
    network = either
    # Neither the order of the numbers nor room for more of them is seen; which they are is.
    logits = np.asarray(judge(network, ITEMS))
    assert logits.shape == (3, 7)
    turned = jnp.stack([ITEMS[0, ::-1], jnp.roll(ITEMS[1], 1), ITEMS[2, jnp.asarray([2, 0, 3, 1])]])
    np.testing.assert_allclose(judge(network, turned), logits, atol=1e-5)
    roomier = jnp.pad(ITEMS, ((0, 0), (0, 3)), constant_values=-1)
    np.testing.assert_allclose(judge(network, roomier), logits, atol=1e-5)
    for column, other in ((0, 4), (1, 6), (2, -1)):
        changed = np.asarray(judge(network, ITEMS.at[0, column].set(other)))
        assert np.abs(changed[0] - logits[0]).max() > 1e-3
        np.testing.assert_allclose(changed[1:], logits[1:], atol=1e-5)


def test_numbers_beyond_the_table_share_a_row(network, judge):
    large, larger = (judge(network, ITEMS.at[0, 0].set(number)) for number in (32, 10**9))
    np.testing.assert_array_equal(large, larger)
    assert np.abs(np.asarray(large - judge(network, ITEMS.at[0, 0].set(31))))[0].max() > 1e-3


def test_more_numbers_get_rows_of_their_own(network, judge):
    """A wider network says what the one before said, and can learn more."""
    wide = widen_numbers(network, 50)
    assert wide.cfg == dataclasses.replace(CFG, num_numbers=50)
    items = jnp.asarray([[3, 5, 8, -1], [49, 1, 33, -1], [50, 10**9, 32, 31]], jnp.int32)
    np.testing.assert_array_equal(judge(wide, items), judge(network, items))
    embed = jax.grad(lambda network: judge(network, items)[1, 0])(wide).trunk.embed
    assert set(np.flatnonzero(np.asarray(embed).any(axis=1))) == {49, 1, 33, 51}
    with pytest.raises(ValueError, match="num_numbers=31: the network has 32 already"):
        widen_numbers(network, 31)


def test_the_value_is_that_of_the_goal(either, judge):
    network = either
    chances = 1 / (1 + np.exp(-np.asarray(judge(network, ITEMS), np.float64)))
    values = jax.jit(apply_state_value)(network, ITEMS, jnp.asarray([0, 6, 3], jnp.int32))
    np.testing.assert_allclose(values, chances[np.arange(3), [0, 6, 3]], atol=1e-6)
    # No problem has such goals: a state is worth nothing for them.
    outside = jax.jit(apply_state_value)(network, ITEMS, jnp.asarray([-1, 7, 10**9], jnp.int32))
    np.testing.assert_array_equal(outside, 0)


def test_a_file_of_before_there_were_two_readouts(network, tmp_path):
    path = save_state_value(tmp_path, network)
    config = dataclasses.asdict(CFG)
    del config["readout"]
    save_file(load_file(path), path, {"config": json.dumps(config)})
    assert load_state_value(tmp_path).cfg == CFG


def test_a_file_of_a_network_that_is_asked(asked, tmp_path):
    save_state_value(tmp_path, asked, "bfloat16")
    loaded = load_state_value(tmp_path, jnp.bfloat16)
    assert loaded.cfg == asked.cfg
    assert loaded.trunk.embed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.goals.weight, asked.goals.weight.astype(jnp.bfloat16))
    assert loaded.goals.weight.dtype == jnp.float32
    narrow, wide = (jax.jit(state_goal_logits)(one, ITEMS) for one in (loaded, asked))
    np.testing.assert_allclose(narrow, wide, atol=0.1)


def test_file_round_trip(network, tmp_path):
    save_state_value(tmp_path, network)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_VALUE]
    loaded = load_state_value(tmp_path)
    assert loaded.cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, loaded, network)
    narrow = load_state_value(tmp_path, jnp.bfloat16)
    assert narrow.trunk.embed.dtype == jnp.bfloat16
    assert narrow.goals.state.weight.dtype == jnp.float32
    save_state_value(tmp_path, network, "bfloat16")
    np.testing.assert_allclose(
        load_state_value(tmp_path).trunk.embed, network.trunk.embed, rtol=8e-3
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors, config: tensors.pop("goals.goal.bias"),
            "missing, or too many: goals.goal",
        ),
        (
            lambda tensors, config: tensors.update({"goals.state.bias": np.zeros(3, np.float32)}),
            r"goals.state.bias is \[3\], expected \[8\]",
        ),
        (lambda tensors, config: config.update(num_layers=0), "num_layers must be a positive"),
        (lambda tensors, config: config.pop("num_goals"), "num_goals"),
        (lambda tensors, config: config.update(model_dim=10**6), "trunk.embed is"),
    ],
)
def test_damaged_files_are_told(network, tmp_path, damage, message):
    path = save_state_value(tmp_path, network)
    tensors, config = load_file(path), dataclasses.asdict(CFG)
    damage(tensors, config)
    save_file(tensors, path, {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=message):
        load_state_value(tmp_path)


def test_a_file_without_a_config_is_told(network, tmp_path):
    path = save_state_value(tmp_path, network)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match=f"{STATE_VALUE}: config ''"):
        load_state_value(tmp_path)
    with pytest.raises(FileNotFoundError, match=STATE_VALUE):
        load_state_value(tmp_path / "none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_goals": 0}, "num_goals must be a positive integer, got 0"),
        ({"model_dim": 20}, "model_dim=20: accepted are multiples of 8"),
        ({"ffn_dim": True}, "ffn_dim must be a positive integer, got True"),
        ({"readout": "guessed"}, r"readout 'guessed': accepted \('factors', 'asked'\)"),
        (
            {"readout": "asked", "num_goals": 33, "num_numbers": 32},
            "num_goals=33: accepted with readout 'asked' is at most num_numbers=32",
        ),
    ],
)
def test_shapes_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        StateValueConfig(**{"num_goals": 3, **fields})
