"""Sampling against the spec's golden numbers, and against the distributions it claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.inference.sampling import (
    SamplingConfig,
    choose_tokens,
    filter_candidates,
    token_confidence,
    token_uncertainty,
)

Q = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], np.float32))


def keys(num_rows, seed=0):
    return jax.random.split(jax.random.key(seed), num_rows)


def choose(logits, cfg, num_siblings=1, active=None, seed=0):
    active = jnp.ones(logits.shape[0], bool) if active is None else jnp.asarray(active)
    run = jax.jit(lambda k, x, a: choose_tokens(k, x, a, cfg, num_siblings=num_siblings))
    return run(keys(logits.shape[0], seed), jnp.asarray(logits, jnp.float32), active)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.526316, 0.315789, 0.157895, 0]),
        ({"top_k": 3}, [0.526316, 0.315789, 0.157895, 0]),
        ({"min_p": 0.2}, [0.526316, 0.315789, 0.157895, 0]),
        ({}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_filters_give_golden_g41(settings, expected):
    probs = np.exp(filter_candidates(jnp.asarray(Q), SamplingConfig(**settings)))
    np.testing.assert_allclose(probs[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.7}, [0.588797, 0.283817, 0.105438, 0.021948]),
        ({"temperature": 0.7, "top_k": 4}, [0.588797, 0.283817, 0.105438, 0.021948]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
    ],
)
def test_samples_follow_the_distribution_and_report_its_logprob(settings, expected):
    num_rows = 20_000
    choice = choose(np.repeat(Q, num_rows, 0), SamplingConfig(**settings))
    token = np.asarray(choice.token)
    share = np.bincount(token, minlength=4) / num_rows
    # Five standard errors of a binomial share.
    assert (np.abs(share - expected) <= 5 * np.sqrt(0.25 / num_rows)).all()
    np.testing.assert_allclose(
        np.exp(choice.behaviour_logprob), np.asarray(expected)[token], atol=1e-5
    )
    np.testing.assert_allclose(choice.logprob, Q[0][token], atol=1e-5)


def test_untruncated_sampling_covers_a_large_vocabulary():
    """Two levels of blocks, the last one partly filled: all tokens are reachable."""
    num_rows, num_vocab = 30_000, 700
    weights = np.linspace(0.0, 1.0, num_vocab)
    probs = weights / weights.sum()
    with np.errstate(divide="ignore"):
        logits = np.log(probs)[None].repeat(num_rows, 0)
    token = np.asarray(choose(logits, SamplingConfig()).token)
    assert token.min() > 0
    assert token.max() < num_vocab
    counts = np.bincount(token, minlength=num_vocab)
    expected = probs * num_rows
    chi_square = ((counts - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < num_vocab + 6 * np.sqrt(2 * num_vocab)


def test_greedy_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(5, 37))
    choice = choose(logits, SamplingConfig("greedy"))
    np.testing.assert_array_equal(choice.token, logits.argmax(-1))
    np.testing.assert_array_equal(choice.behaviour_logprob, np.zeros(5))
    expected = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(choice.top_logprobs, jax.lax.top_k(expected, 5)[0], atol=1e-5)


def test_diverse_beam_golden_g40():
    """Group 2's scores are [-1.693, -1.204, -1.609] once group 1 took token 0: it takes token 1."""
    logits = np.log(np.asarray([[0.5, 0.3, 0.2]] * 2))
    choice = choose(logits, SamplingConfig("diverse_beam", diversity=1.0), num_siblings=2)
    np.testing.assert_array_equal(choice.token, [0, 1])


def test_diverse_beam_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(12, 40)).astype(np.float32)
    active = rng.random(12) < 0.8
    choice = choose(logits, SamplingConfig("diverse_beam", diversity=0.7), 4, active)
    expected = []
    for node in range(3):
        counts = np.zeros(40)
        for sibling in range(4):
            row = node * 4 + sibling
            logprobs = logits[row] - np.log(np.exp(logits[row]).sum())
            expected.append(int(np.argmax(logprobs - 0.7 * counts)))
            counts[expected[-1]] += active[row]
    np.testing.assert_array_equal(choice.token, expected)


def test_rows_do_not_see_each_other():
    logits = np.random.default_rng(2).normal(size=(6, 50))
    for cfg in (SamplingConfig(), SamplingConfig(top_p=0.9)):
        together = choose(logits, cfg)
        run = jax.jit(lambda k, x, cfg=cfg: choose_tokens(k, x, jnp.ones(1, bool), cfg))
        alone = run(keys(6)[3:4], jnp.asarray(logits[3:4], jnp.float32))
        assert int(together.token[3]) == int(alone.token[0])


def test_token_uncertainty_golden_g29():
    probs = jnp.asarray([[0.5, 0.25, 0.125, 0.125], [0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    found = token_uncertainty(jnp.log(probs) + jnp.asarray([[3.0], [0.0], [-7.0]]))
    np.testing.assert_allclose(found.entropy, [1.213008, np.log(2), 0], atol=1e-5)
    np.testing.assert_allclose(found.varentropy, [0.330311, 0, 0], atol=1e-5)


def test_token_confidence_golden_g35():
    probs = jnp.asarray([0.6, 0.2, 0.1, 0.05, 0.03])
    confidence = token_confidence(jnp.log(probs[:1]), jnp.log(probs)[None])
    np.testing.assert_allclose(confidence, [0.612245], atol=1e-5)
    # The golden step: .612245, .9 of .96 and .5 of .9 have the mean .701767.
    rows = jnp.log(jnp.asarray([[0.9, 0.03, 0.02, 0.007, 0.003], [0.5, 0.2, 0.1, 0.06, 0.04]]))
    both = token_confidence(rows[:, 0], rows)
    np.testing.assert_allclose((0.612245 + both.sum()) / 3, 0.701767, atol=1e-5)


def test_a_token_outside_the_alternatives_replaces_the_last():
    top = jnp.log(jnp.asarray([[0.4, 0.2, 0.1, 0.08, 0.05]]))
    confidence = token_confidence(jnp.log(jnp.asarray([0.01])), top)
    np.testing.assert_allclose(confidence, [0.01 / (0.4 + 0.2 + 0.1 + 0.08 + 0.01)], atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "beams"},
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"diversity": -0.1},
        {"max_candidates": 0},
    ],
)
def test_bad_settings_name_the_value(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"sampling {name}={value!r}"):
        SamplingConfig(**settings)
