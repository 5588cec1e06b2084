"""Beams against every step there is: a model of six tokens whose steps are all enumerated."""

import dataclasses
import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.inference.attention import Context
from rlm_jax.inference.decode import decode_steps
from rlm_jax.inference.extend import extend, last_hidden
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.attention import MASKED_SCORE, make_dense_attend
from rlm_jax.models.params import init_params
from rlm_jax.models.presets import preset
from rlm_jax.models.transformer import forward, unembed
from rlm_jax.text.answers import (
    OTHER,
    AnswerRule,
    answer_key,
    init_answer_state,
    update_answer,
)
from rlm_jax.text.steps import StepRule

NUM_TOKENS, SEPARATOR, FINAL = 6, 4, 5
PROMPT_LENGTHS = (5, 3, 4)
WIDTH, SLOTS, LONGEST = 6, 4, 3
SHARP = 0.35
STOCHASTIC = SamplingConfig("stochastic_beam", temperature=SHARP)
BEAM = SamplingConfig("beam", temperature=SHARP)


def step_rule():
    token = np.arange(NUM_TOKENS)
    none = np.zeros(NUM_TOKENS, bool)
    ends, final = token == SEPARATOR, token == FINAL
    tables = map(jnp.asarray, (ends, ends, none, none, none, final))
    return StepRule(*tables, kind="end_token", max_tokens=LONGEST)


def answer_rule():
    """Tokens 0 to 3 are digits, so that nearly every step states a number of its own."""
    classes = np.asarray([[0], [1], [2], [3], [OTHER]], np.int32)
    strings = np.minimum(np.arange(NUM_TOKENS), 4).astype(np.int32)
    return AnswerRule(*map(jnp.asarray, (strings, classes, np.ones(5, np.int32))))


@functools.cache
def make_model(name):
    cfg = dataclasses.replace(preset(name), vocab_size=NUM_TOKENS, eos_ids=(FINAL,), bos_id=0)
    return init_params(jax.random.key(3), cfg), cfg


@functools.cache
def _extend(model_name):
    return jax.jit(functools.partial(extend, cfg=make_model(model_name)[1]))


@functools.cache
def prefilled(model_name):
    """Prompts of three problems, the context they make and the states they end with."""
    params, _ = make_model(model_name)
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(PROMPT_LENGTHS, jnp.int32)
    tokens = rng.integers(0, SEPARATOR, (len(PROMPT_LENGTHS), WIDTH)).astype(np.int32)
    done = _extend(model_name)(params, jnp.asarray(tokens), lengths)
    return tokens, done, last_hidden(done.hidden, lengths)


@functools.cache
def program(model_name, sampling, num_siblings):
    _, cfg = make_model(model_name)

    def run(params, keys, hidden, contexts, starts, limits, first_bias):
        return decode_steps(
            params,
            keys,
            hidden,
            init_answer_state(starts),
            cfg=cfg,
            contexts=contexts,
            starts=starts,
            limits=limits,
            rule=step_rule(),
            answer_rule=answer_rule(),
            sampling=sampling,
            num_siblings=num_siblings,
            num_slots=SLOTS,
            with_uncertainty=True,
            first_bias=first_bias,
        )

    return jax.jit(run)


def decode(
    sampling,
    num_siblings,
    problems=(0, 1, 2),
    seeds=None,
    *,
    name="tiny-llama",
    limits=None,
    first_bias=None,
):
    """One group of rows for each of `problems`, its keys those of its own seed."""
    _, done, hidden = prefilled(name)
    problems = np.asarray(problems)
    seeds = np.arange(len(problems)) if seeds is None else np.asarray(seeds)
    length = np.asarray(PROMPT_LENGTHS, np.int32)[problems]
    caches = tuple(cache[problems] for cache in done.caches)
    context = Context(
        keys=None,
        values=caches,
        positions=jnp.broadcast_to(jnp.arange(WIDTH), (len(problems), WIDTH)),
        valid=jnp.asarray(np.arange(WIDTH) < length[:, None]),
    )
    rows = np.repeat(np.arange(len(problems)), num_siblings)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), num_siblings))(seeds)
    limits = np.full(len(rows), SLOTS) if limits is None else np.asarray(limits)
    return program(name, sampling, num_siblings)(
        make_model(name)[0],
        keys.reshape(-1),
        hidden[problems][rows],
        (context,),
        jnp.asarray(length[rows]),
        jnp.asarray(limits, jnp.int32),
        None if first_bias is None else jnp.asarray(first_bias, jnp.float32),
    )


@functools.cache
def _dense(name):
    params, cfg = make_model(name)

    def run(tokens, mask):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        attend = make_dense_attend(cfg, key_mask=mask)
        hidden, _ = forward(params, tokens, positions, cfg=cfg, attend=attend)
        return unembed(params, hidden, cfg=cfg)

    return jax.jit(run)


@functools.cache
def next_logits(name, problem, depth=2):
    """{prefix: logits of what follows} for all prefixes of up to `depth` tokens without an end."""
    prompt = prefilled(name)[0][problem, : PROMPT_LENGTHS[problem]].tolist()
    prefixes = [p for n in range(depth + 1) for p in itertools.product(range(SEPARATOR), repeat=n)]
    tokens = np.zeros((len(prefixes), WIDTH + SLOTS), np.int32)
    for row, prefix in enumerate(prefixes):
        tokens[row, : len(prompt) + len(prefix)] = prompt + list(prefix)
    used = len(prompt) + np.asarray([len(prefix) for prefix in prefixes])
    logits = np.asarray(_dense(name)(tokens, np.arange(tokens.shape[1]) < used[:, None]))
    last = logits[np.arange(len(prefixes)), used - 1].astype(np.float64)
    return dict(zip(prefixes, last, strict=True))


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def next_logprobs(name, problem, temperature=1.0, top_k=NUM_TOKENS):
    """The same after temperature and top-k, -inf where cut off."""
    table = {}
    for prefix, logits in next_logits(name, problem).items():
        cut = np.sort(logits)[-top_k]
        table[prefix] = log_softmax(np.where(logits >= cut, logits / temperature, -np.inf))
    return table


def plain_uncertainty(table, step):
    """Sums of entropy and varentropy over the distributions that a step's tokens came from."""
    total = np.zeros(2)
    for i in range(len(step)):
        surprise = -table[step[:i]]
        probs = np.exp(-surprise)
        entropy = (probs * surprise).sum()
        total += entropy, (probs * surprise**2).sum() - entropy**2
    return total


def has_ended(step):
    return len(step) == LONGEST or (len(step) > 0 and step[-1] >= SEPARATOR)


def all_steps(table):
    """{step: log-probability} of all steps of at most three tokens."""
    steps = {}
    for prefix, logprobs in table.items():
        above = sum(table[prefix[:i]][prefix[i]] for i in range(len(prefix)))
        for token in range(NUM_TOKENS):
            if has_ended((*prefix, token)):
                steps[(*prefix, token)] = above + logprobs[token]
    assert abs(np.exp(list(steps.values())).sum() - 1) < 1e-9
    return steps


def plain_beam(table, width, min_ratio=0.0):
    """Beam search in plain Python: [(step, log-probability)], and the tokens it forwarded."""
    beams, forwarded = [((), 0.0)], 0
    while not all(has_ended(step) for step, _ in beams):
        offers = []
        for step, logprob in beams:
            if has_ended(step):
                offers.append((step, logprob, 0))
            else:
                offers += [((*step, t), logprob + table[step][t], 1) for t in range(NUM_TOKENS)]
        offers = [offer for offer in offers if offer[1] > -np.inf]
        offers = sorted(offers, key=lambda offer: -offer[1])[:width]
        offers = [offer for offer in offers if np.exp(offer[1] - offers[0][1]) >= min_ratio]
        forwarded += sum(new for *_, new in offers)
        beams = [(step, logprob) for step, logprob, _ in offers]
    return beams, forwarded


def steps_of(out, num_siblings):
    """The steps of every group, as tuples, () where a row holds none."""
    tokens, length = np.asarray(out.tokens), np.asarray(out.length)
    assert (tokens[np.arange(SLOTS) >= length[:, None]] == 0).all()
    rows = [tuple(row[:n].tolist()) for row, n in zip(tokens, length, strict=True)]
    return [rows[i : i + num_siblings] for i in range(0, len(rows), num_siblings)]


def test_wide_beams_find_the_likeliest_of_all_steps_in_order():
    """With 32 rows no prefix of a step is ever dropped, so the beam is exhaustive."""
    out = decode(BEAM, 32, problems=(0, 1))
    for group, found in enumerate(steps_of(out, 32)):
        steps = all_steps(next_logprobs("tiny-llama", group, SHARP))
        best = sorted(steps, key=lambda step: -steps[step])[:32]
        assert found == best
        rows = slice(group * 32, group * 32 + 32)
        np.testing.assert_allclose(out.score[rows], [steps[step] for step in best], atol=1e-4)
        plain = all_steps(next_logprobs("tiny-llama", group))
        np.testing.assert_allclose(out.logprob[rows], [plain[step] for step in best], atol=1e-4)
    np.testing.assert_array_equal(out.behaviour_logprob, np.zeros(64))


@pytest.mark.parametrize("top_k", [0, 3])
def test_narrow_beams_equal_a_plain_beam_search(top_k):
    out = decode(dataclasses.replace(BEAM, top_k=top_k), 4)
    assert len(set(np.asarray(out.forwarded_tokens).tolist())) > 1
    for group, found in enumerate(steps_of(out, 4)):
        table = next_logprobs("tiny-llama", group, SHARP, top_k or NUM_TOKENS)
        beams, forwarded = plain_beam(table, 4)
        rows = slice(group * 4, group * 4 + 4)
        assert found == [step for step, _ in beams]
        np.testing.assert_allclose(out.score[rows], [lp for _, lp in beams], atol=1e-4)
        assert int(out.forwarded_tokens[rows].sum()) == forwarded


def test_beams_far_below_the_best_are_given_up():
    """As in plain Python, and nothing is left of them: their rows are empty."""
    given_up = 0
    out = decode(dataclasses.replace(BEAM, min_ratio=0.3), 4)
    for group, found in enumerate(steps_of(out, 4)):
        table = next_logprobs("tiny-llama", group, SHARP)
        beams, forwarded = plain_beam(table, 4, 0.3)
        rows = np.arange(group * 4, group * 4 + 4)
        assert found == [step for step, _ in beams] + [()] * (4 - len(beams))
        assert int(out.forwarded_tokens[rows].sum()) == forwarded
        assert not np.asarray(out.terminal)[rows[len(beams) :]].any()
        given_up += 4 - len(beams)
    assert given_up > 0


@pytest.mark.parametrize("sampling", [BEAM, SamplingConfig("sample")], ids=["beam", "sample"])
def test_no_step_begins_with_a_barred_token(sampling):
    """The others keep their odds; behind the first token all are free again."""
    barred = np.array([True, True, False, False, False, False])
    out = decode(sampling, 4, first_bias=np.where(barred, MASKED_SCORE, 0))
    steps = [step for group in steps_of(out, 4) for step in group]
    assert not {step[0] for step in steps} & {0, 1}
    assert {0, 1} & {token for step in steps for token in step[1:]}
    for row, step in enumerate(steps):
        table = next_logprobs("tiny-llama", row // 4)
        first = log_softmax(np.where(barred, -np.inf, table[()]))
        exact = first[step[0]] + sum(table[step[:i]][step[i]] for i in range(1, len(step)))
        np.testing.assert_allclose(out.logprob[row], exact, atol=1e-4)


def test_one_beam_is_greedy():
    beam = decode(BEAM, 1)
    greedy = decode(SamplingConfig("greedy"), 1)
    assert greedy.score is None
    for a, b in zip(*map(jax.tree.leaves, (dataclasses.replace(beam, score=None), greedy)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


@functools.cache
def many_groups(sampling, num_siblings, num_groups=2048, calls=2):
    """Steps and scores of many independent groups of problem 0."""
    steps, scores = [], []
    for call in range(calls):
        seeds = call * num_groups + np.arange(num_groups)
        out = decode(sampling, num_siblings, np.zeros(num_groups, int), seeds)
        steps += steps_of(out, num_siblings)
        scores.append(np.asarray(out.score).reshape(-1, num_siblings))
    return steps, np.concatenate(scores).astype(np.float64)


def assert_shares(counts, probs, total):
    """Counts of a multinomial: chi-square over cells of at least 5, five deviations wide."""
    big = probs * total >= 5
    cells = np.append(counts[big], counts[~big].sum())
    expected = np.append(probs[big], probs[~big].sum()) * total
    cells, expected = cells[expected > 0], expected[expected > 0]
    freedom = len(cells) - 1
    chi_square = ((cells - expected) ** 2 / expected).sum()
    assert freedom > 5
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("top_k", [0, 3])
def test_stochastic_beams_sample_whole_steps_without_replacement(top_k):
    """First, second and third of a group, each against its exact distribution."""
    table = next_logprobs("tiny-llama", 0, SHARP, top_k or NUM_TOKENS)
    steps = all_steps(table)
    probs = np.exp(list(steps.values()))
    groups, _ = many_groups(dataclasses.replace(STOCHASTIC, top_k=top_k), 3)
    number = {step: i for i, step in enumerate(steps)}
    drawn = np.asarray([[number[step] for step in group] for group in groups])
    assert (np.diff(np.sort(drawn, 1), axis=1) > 0).all()
    # pairs[i, j]: i is drawn first, then j; triples by the same rule.
    left = 1 - probs
    pairs = probs[:, None] * probs[None] / left[:, None]
    np.fill_diagonal(pairs, 0.0)
    left = 1 - probs[:, None] - probs[None]
    triples = pairs[:, :, None] * probs / left[..., None]
    index = np.arange(len(probs))
    triples[index, :, index] = triples[:, index, index] = 0.0
    for place, expected in enumerate([probs, pairs.sum(0), triples.sum((0, 1))]):
        assert abs(expected.sum() - 1) < 1e-9
        counts = np.bincount(drawn[:, place], minlength=len(probs))
        assert_shares(counts, expected, len(groups))
    inclusion = probs + pairs.sum(0) + triples.sum((0, 1))
    share = np.bincount(drawn.reshape(-1), minlength=len(probs)) / len(groups)
    error = np.sqrt(inclusion * (1 - inclusion) / len(groups))
    assert (np.abs(share - inclusion) <= 5 * error + 1e-3).all()


def test_scores_are_gumbel_variables_that_weigh_the_sample():
    steps = all_steps(next_logprobs("tiny-llama", 0, SHARP))
    groups, scores = many_groups(STOCHASTIC, 3)
    assert (np.diff(scores, axis=1) <= 0).all()
    # The largest of all noisy log-probabilities: a standard Gumbel variable.
    first = scores[:, 0]
    assert abs(first.mean() - 0.5772) < 5 * np.pi / np.sqrt(6 * len(first))
    below = (np.sort(first)[:, None] <= [-1.0, 0.0, 1.0, 2.0]).mean(0)
    expected = np.exp(-np.exp([1.0, 0.0, -1.0, -2.0]))
    np.testing.assert_allclose(below, expected, atol=5 * 0.5 / np.sqrt(len(first)))
    # The paper's estimator: weights p / P(score > the last) of all but the last are unbiased.
    logprob = np.asarray([[steps[step] for step in group[:-1]] for group in groups])
    reached = -np.expm1(-np.exp(logprob - scores[:, -1:]))
    weights = np.exp(logprob) / reached
    length = np.asarray([[len(step) for step in group[:-1]] for group in groups])
    mean_length = sum(np.exp(lp) * len(step) for step, lp in steps.items())
    for value, truth in ((np.ones_like(length), 1.0), (length, mean_length)):
        estimate = (weights * value).sum(1)
        assert abs(estimate.mean() - truth) < 5 * estimate.std() / np.sqrt(len(groups))


@jax.jit
def _answers(tokens, length):
    """Answer keys of what the steps say, read from their beginnings."""
    state = init_answer_state(length)
    for slot in range(LONGEST):
        padded = jnp.where(slot < length, tokens[:, slot], -1)
        state = update_answer(answer_rule(), state, padded)
    return answer_key(state)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [("tiny-llama", BEAM), ("tiny-llama", STOCHASTIC), ("tiny-gemma3", STOCHASTIC)],
    ids=["llama-beam", "llama-stochastic", "gemma3-stochastic"],
)
def test_a_step_is_what_the_network_makes_of_its_tokens(name, sampling):
    """Whatever row its tokens came through: caches, state, probabilities and stated answer."""
    num_siblings = 4
    params, _ = make_model(name)
    out = decode(sampling, num_siblings, seeds=(7, 8, 9), name=name)
    prompts = prefilled(name)[0]
    tokens = np.zeros((3 * num_siblings, WIDTH + SLOTS), np.int32)
    starts = np.repeat(PROMPT_LENGTHS, num_siblings)
    length = np.asarray(out.length)
    for row, (start, own) in enumerate(zip(starts, np.asarray(out.tokens), strict=True)):
        tokens[row, :start] = prompts[row // num_siblings, :start]
        tokens[row, start : start + length[row]] = own[: length[row]]
    ends = jnp.asarray(starts + length)
    done = _extend(name)(params, jnp.asarray(tokens), ends)
    np.testing.assert_allclose(out.hidden, last_hidden(done.hidden, ends), atol=1e-4)
    for mine, full in zip(out.caches, done.caches, strict=True):
        for row, start in enumerate(starts):
            span = slice(start, start + length[row])
            np.testing.assert_allclose(mine[row, :, : length[row]], full[row, :, span], atol=1e-4)
    expected = _answers(out.tokens, out.length)
    np.testing.assert_array_equal(answer_key(out.answers), expected)
    assert len(set(np.asarray(expected).tolist())) > num_siblings
    for group, found in enumerate(steps_of(out, num_siblings)):
        rows = slice(group * num_siblings, (group + 1) * num_siblings)
        for temperature, field in ((1.0, "logprob"), (SHARP, "behaviour_logprob")):
            if sampling == BEAM and field == "behaviour_logprob":
                continue
            exact = all_steps(next_logprobs(name, group, temperature))
            np.testing.assert_allclose(
                getattr(out, field)[rows], [exact[step] for step in found], atol=1e-4
            )
        table = next_logprobs(name, group)
        unsure = np.stack([out.uncertainty.entropy[rows], out.uncertainty.varentropy[rows]], 1)
        exact = [plain_uncertainty(table, step) for step in found]
        np.testing.assert_allclose(unsure, exact, atol=1e-4)
        ends_solution = [step[-1] == FINAL for step in found]
        np.testing.assert_array_equal(out.terminal[rows], ends_solution)


@pytest.mark.parametrize("sampling", [STOCHASTIC, BEAM], ids=lambda s: s.method)
def test_groups_do_not_see_each_other(sampling):
    among = decode(sampling, 4, (2, 0, 1), seeds=(5, 6, 7))
    others = decode(
        sampling, 4, (0, 2, 2), seeds=(6, 16, 17), limits=[SLOTS] * 4 + [0] * 4 + [1] * 4
    )
    assert steps_of(among, 4)[1] == steps_of(others, 4)[0]
    np.testing.assert_allclose(among.score[4:8], others.score[:4], atol=1e-5)
    if sampling.method == "stochastic_beam":
        again = decode(sampling, 4, (0, 0, 0), seeds=(6, 16, 17))
        assert steps_of(again, 4)[0] == steps_of(others, 4)[0] != steps_of(again, 4)[1]


def test_idle_rows_stay_empty_and_what_is_left_holds_the_best():
    limits = [3] * 4 + [0] * 4 + [0, 3, 0, 3]
    out = decode(STOCHASTIC, 4, (0, 1, 0), seeds=(3, 4, 3), limits=limits)
    full, none, some = steps_of(out, 4)
    assert all(full)
    assert none == [()] * 4
    assert (some[0], some[2]) == ((), ())
    assert len({some[1], some[3]} - {()}) == 2
    empty = np.asarray(out.length) == 0
    np.testing.assert_array_equal(empty, np.asarray(limits) == 0)
    np.testing.assert_array_equal(np.asarray(out.score) == -np.inf, empty)
    assert not np.asarray(out.forwarded_tokens)[empty].any()
    best = decode(BEAM, 4, (0, 1, 0), limits=limits)
    beams, _ = plain_beam(next_logprobs("tiny-llama", 0, SHARP), 2)
    assert [steps_of(best, 4)[2][row] for row in (1, 3)] == [step for step, _ in beams]


def test_a_group_has_one_limit_the_smallest():
    out = decode(STOCHASTIC, 4, limits=[3, 2, 3, 3, 1, 1, 1, 1, 3, 3, 3, 3])
    assert np.asarray(out.length).reshape(3, 4).max(1).tolist() == [2, 1, 3]
    assert all(len(set(group)) == 4 for group in steps_of(out, 4))


def test_where_there_are_fewer_steps_than_rows_the_others_stay_empty():
    for sampling, rows, problems in ((STOCHASTIC, 8, (0,)), (BEAM, 32, (0, 1))):
        out = decode(sampling, rows, problems, limits=[1] * rows * len(problems))
        for found in steps_of(out, rows):
            assert set(found[:NUM_TOKENS]) == {(token,) for token in range(NUM_TOKENS)}
            assert found[NUM_TOKENS:] == [()] * (rows - NUM_TOKENS)
    only = dataclasses.replace(STOCHASTIC, top_k=1)
    for found in steps_of(decode(only, 4), 4):
        assert len(found[0]) > 0
        assert found[1:] == [()] * 3


def test_a_shape_is_compiled_once():
    run = cast(Any, program("tiny-llama", STOCHASTIC, 4))
    decode(STOCHASTIC, 4, (2, 1, 0))
    before = run._cache_size()
    decode(STOCHASTIC, 4, (1, 1, 2), seeds=(7, 8, 9), limits=[1] * 8 + [0] * 4)
    assert run._cache_size() == before


def test_rows_that_make_no_groups_are_refused():
    with pytest.raises(ValueError, match="6 rows are no multiple of num_siblings=4"):
        jax.eval_shape(
            functools.partial(
                decode_steps,
                cfg=make_model("tiny-llama")[1],
                contexts=(),
                rule=step_rule(),
                answer_rule=answer_rule(),
                sampling=STOCHASTIC,
                num_siblings=4,
                num_slots=SLOTS,
            ),
            make_model("tiny-llama")[0],
            jax.random.split(jax.random.key(0), 6),
            jnp.zeros((6, 32)),
            init_answer_state(jnp.zeros(6, jnp.int32)),
            starts=jnp.zeros(6, jnp.int32),
            limits=jnp.ones(6, jnp.int32),
        )
