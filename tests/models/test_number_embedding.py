"""Embeddings of numbers: their scale, what they leave alone, and that they hold the values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.models.number_embedding import init_number_embeddings, number_waves

WIDTH = 160


@pytest.fixture(scope="module")
def table():
    return jax.random.normal(jax.random.key(1), (1200, WIDTH)) / WIDTH**0.5


def test_other_tokens_keep_their_rows_and_numbers_their_scale(table):
    numbers = [-1] * 200 + list(range(1000))
    new = np.asarray(init_number_embeddings(jax.random.key(0), table, numbers))
    np.testing.assert_array_equal(new[:200], table[:200])
    drawn, random = (np.linalg.norm(rows, axis=1) for rows in (new[200:], table[200:]))
    assert abs(drawn.mean() / random.mean() - 1) < 0.1
    assert (new[200:] != np.asarray(table[200:])).any(axis=1).all()


def test_sums_turn_waves_and_products_turn_those_of_logarithms():
    first, second = np.array([7, 12, 60]), np.array([35, 3, 16])
    waves, other, both = (
        np.asarray(number_waves(jnp.asarray(n))) for n in (first, second, first + second)
    )
    product = np.asarray(number_waves(jnp.asarray(first * second)))
    half = waves.shape[1] // 2
    turned = (waves[:, :half] + 1j * waves[:, half:]) * (other[:, :half] + 1j * other[:, half:])
    whole = [np.allclose(turned[:, i].real, both[:, i], atol=1e-3) for i in range(half)]
    logs = [np.allclose(turned[:, i].imag, product[:, half + i], atol=1e-3) for i in range(half)]
    assert sum(whole) >= 10
    assert sum(logs) >= 5
    assert all(a or b for a, b in zip(whole, logs, strict=True))
    assert np.isfinite(np.asarray(number_waves(jnp.asarray([0])))).all()


def test_a_linear_map_reads_values_off_the_embeddings(table):
    new = np.asarray(init_number_embeddings(jax.random.key(0), table, [-1] * 200 + [*range(1000)]))

    def miss(rows):
        values = np.arange(300) / 300
        taught, asked = np.arange(300) % 3 > 0, np.arange(300) % 3 == 0
        weights = np.linalg.lstsq(rows[taught], values[taught], rcond=None)[0]
        return np.sqrt(np.mean((rows[asked] @ weights - values[asked]) ** 2))

    assert miss(new[200:500]) < 0.5 * miss(np.asarray(table)[200:500])


def test_every_token_has_a_number_or_none(table):
    with pytest.raises(ValueError, match="3 numbers for a table of 1200"):
        init_number_embeddings(jax.random.key(0), table, [1, 2, 3])
