"""Value heads against their definition, and their file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlm_jax.models.heads import (
    X1_HEAD,
    Dense,
    HeadConfig,
    ValueHead,
    apply_value_head,
    describe_value_head,
    goal_logits,
    init_value_head,
    load_value_head,
    save_value_head,
    squash_value,
    value_logits,
)
from rlm_jax.models.histogram import Histogram, bin_centres
from rlm_jax.models.number_embedding import NUM_WAVES, number_waves

# Golden G43 of the blueprint's appendix: 2 sigmoid(z) - 1 at z = 0, 1, -2.
G43 = [0.0, 0.462117, -0.761594]


def test_x1_squash_golden():
    values = squash_value(jnp.array([0.0, 1.0, -2.0]), "signed_sigmoid")
    np.testing.assert_allclose(values, G43, atol=1e-6)


def test_x1_head_is_three_dense_layers():
    head = init_value_head(jax.random.key(0), 24, X1_HEAD)
    assert [layer.weight.shape for layer in head.layers] == [(1024, 24), (256, 1024), (1, 256)]
    hidden = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    (w1, b1), (w2, b2), (w3, b3) = (
        (np.asarray(d.weight, np.float64), np.asarray(d.bias, np.float64)) for d in head.layers
    )
    x = np.maximum(np.maximum(hidden @ w1.T + b1, 0) @ w2.T + b2, 0) @ w3.T + b3
    expected = 2 / (1 + np.exp(-x[..., 0])) - 1
    values = jax.jit(apply_value_head)(head, jnp.asarray(hidden))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert np.std(expected) > 0.01


@pytest.mark.parametrize(
    ("squash", "expected"),
    [("none", 2.0), ("tanh", np.tanh(2.0)), ("sigmoid", 1 / (1 + np.exp(-2.0)))],
)
def test_linear_head(squash, expected):
    head = ValueHead((Dense(jnp.ones((1, 3)), jnp.array([0.5])),), squash)
    value = apply_value_head(head, jnp.full((3,), 0.5, jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_file_round_trip(tmp_path):
    head = init_value_head(jax.random.key(0), 8, HeadConfig((6, 4), "tanh"))
    save_value_head(tmp_path, head)
    assert [p.name for p in tmp_path.iterdir()] == ["value_head.safetensors"]
    loaded = load_value_head(tmp_path, 8)
    assert loaded.squash == "tanh"
    jax.tree.map(np.testing.assert_array_equal, loaded, head)
    assert load_file(tmp_path / "value_head.safetensors")["layers.2.weight"].shape == (1, 4)


def test_a_categorical_head_is_the_mean_of_its_bins(tmp_path):
    histogram = Histogram(-1.0, 2.0, 21, 0.75)
    head = init_value_head(jax.random.key(1), 8, HeadConfig((6,), "none", histogram))
    assert [layer.weight.shape for layer in head.layers] == [(6, 8), (21, 6)]
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 8)), jnp.float32)
    logits = np.asarray(value_logits(head, hidden), np.float64)
    assert logits.shape == (3, 4, 21)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    values = jax.jit(apply_value_head)(head, hidden)
    np.testing.assert_allclose(values, probs @ np.asarray(bin_centres(histogram)), atol=1e-5)
    save_value_head(tmp_path, head)
    loaded = load_value_head(tmp_path, 8)
    assert loaded.histogram == histogram
    jax.tree.map(np.testing.assert_array_equal, loaded, head)


def test_goals_are_judged_by_a_product_of_two_factors(tmp_path):
    cfg = HeadConfig((6,), "sigmoid", num_goals=5, goal_rank=4)
    head = init_value_head(jax.random.key(1), 8, cfg)
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 8)), jnp.float32)
    waves = np.asarray(number_waves(jnp.arange(5)))
    state, goal = (
        np.asarray(read) @ np.asarray(factor.weight).T + np.asarray(factor.bias)
        for read, factor in ((hidden, head.goals.state), (waves, head.goals.goal))
    )
    logits = goal_logits(head.goals, hidden)
    np.testing.assert_allclose(logits, state @ goal.T / 2, rtol=1e-4, atol=1e-4)
    # The value of the problem's own goal is that of the layers.
    plain = dataclasses.replace(head, goals=None)
    np.testing.assert_array_equal(value_logits(head, hidden), value_logits(plain, hidden))
    save_value_head(tmp_path, head)
    loaded = load_value_head(tmp_path, 8)
    assert (loaded.squash, loaded.goals.num_goals) == ("sigmoid", 5)
    jax.tree.map(np.testing.assert_array_equal, loaded, head)
    with pytest.raises(ValueError, match=r"weight is \[\d, 8\], expected \[\d, 9\]"):
        load_value_head(tmp_path, 9)


@pytest.mark.parametrize("count", ["0x5", "", "12345678", "-1", "five"])
def test_a_number_of_goals_that_is_none_is_refused(tmp_path, count):
    shapes = {"layers.0": (1, 8), "goals.state": (4, 8), "goals.goal": (4, NUM_WAVES)}
    arrays = {f"{name}.weight": shape for name, shape in shapes.items()}
    arrays |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    save(tmp_path, arrays, num_goals=count)
    with pytest.raises(ValueError, match="is no number of goals"):
        load_value_head(tmp_path, 8)


@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        ("[1]", "histogram"),
        ("{", "histogram"),
        ('{"low": 0, "high": 1, "num_bins": 21}', "sigma_bins"),
        ('{"low": 0, "high": 0, "num_bins": 21, "sigma_bins": 1}', "low < high"),
        ('{"low": 0, "high": "1", "num_bins": 21, "sigma_bins": 1}', "histogram"),
        ('{"low": 0, "high": 1, "num_bins": 22, "sigma_bins": 1}', r"expected \[22, 8\]"),
    ],
)
def test_a_histogram_that_does_not_fit_is_refused(tmp_path, histogram, message):
    save(
        tmp_path,
        {"layers.0.weight": (21, 8), "layers.0.bias": (21,)},
        squash="none",
        histogram=histogram,
    )
    with pytest.raises(ValueError, match=message):
        load_value_head(tmp_path, 8)


def save(folder, arrays, **metadata):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in arrays.items()}
    save_file(arrays, folder / "value_head.safetensors", metadata)


@pytest.mark.parametrize(
    ("arrays", "squash", "message"),
    [
        ({"layers.0.weight": (1, 8), "layers.0.bias": (1,)}, "softmax", "squash 'softmax'"),
        (
            {"layers.0.weight": (1, 9), "layers.0.bias": (1,)},
            "tanh",
            r"\[1, 9\], expected \[1, 8\]",
        ),
        ({"layers.0.weight": (2, 8), "layers.0.bias": (2,)}, "tanh", r"expected \[1, 8\]"),
        ({"layers.0.weight": (), "layers.0.bias": ()}, "tanh", r"\[\], expected \[1, 8\]"),
        ({"head.weight": (1, 8)}, "tanh", "expected layers.0.weight"),
        (
            {"layers.0.weight": (1, 8), "layers.0.bias": (1,), "goals.state.bias": (4,)},
            "tanh",
            r"missing, or too many: goals\.goal",
        ),
        (
            {"layers.0.weight": (1, 8), "layers.0.bias": (1,), "extra": (1,)},
            "tanh",
            "too many: extra",
        ),
        ({}, "tanh", "expected layers.0.weight"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path, arrays, squash, message):
    save(tmp_path, arrays, squash=squash)
    with pytest.raises(ValueError, match=message):
        load_value_head(tmp_path, 8)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="value_head"):
        load_value_head(tmp_path, 8)
    (tmp_path / "value_head.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_value_head(tmp_path, 8)


def test_bad_shapes_of_heads_are_refused():
    with pytest.raises(ValueError, match="accepted"):
        HeadConfig(squash="relu")
    with pytest.raises(ValueError, match="positive"):
        HeadConfig((0,))
    with pytest.raises(ValueError, match=r"tanh.*histogram"):
        HeadConfig(histogram=Histogram())
    with pytest.raises(ValueError, match="goal_rank=0"):
        HeadConfig(num_goals=3, goal_rank=0)
    description = describe_value_head(8, HeadConfig((4,)))
    assert description.layers[0].weight.axes == (None, "embed")
