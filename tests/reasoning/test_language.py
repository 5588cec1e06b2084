"""The language expander on a tiny model: what a search stores, spends and decides."""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.inference.pages import path_buckets
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.heads import apply_value_head
from rlm_jax.models.presets import preset
from rlm_jax.models.transformer import forward, unembed
from rlm_jax.reasoning.drive import run_compiled, run_host
from rlm_jax.reasoning.language import (
    LanguageConfig,
    begin,
    make_expand,
)
from rlm_jax.reasoning.language_values import parse_evaluator
from rlm_jax.reasoning.strategies import best_of_n, greedy, puct
from rlm_jax.reasoning.structure import check, path_to_root

# All that decoding sums up, so that every test of a search sees it.
STATISTICS = "confidence=4,entropy=2,varentropy=1"
PROMPTS = ("a long first problem", "second", "third problem", "x")
WIDTH, DEPTH, NODES, LIMIT = 24, 4, 24, 60
STRATEGIES = {
    "best_of_n": best_of_n.make_best_of_n(3, DEPTH),
    "puct": puct.make_puct(num_children=3, num_lanes=2, max_depth=DEPTH),
}


def language(cfg, evaluator=STATISTICS, sampling=None, **changes):
    return LanguageConfig(
        model=cfg,
        sampling=sampling or SamplingConfig(temperature=1.5),
        evaluator=evaluator,
        num_nodes=NODES,
        max_depth=DEPTH,
        max_new_tokens=LIMIT,
        page_tokens=4,
        value_fn=apply_value_head if "value_head" in evaluator else None,
        keeps_subtrees=True,
        **changes,
    )


def encode(prompts):
    tokens = np.zeros((len(prompts), WIDTH), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = list(prompt.encode())
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32)


def keys_of(prompts, seed=0):
    ids = jnp.asarray([PROMPTS.index(prompt) for prompt in prompts])
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids)


@functools.cache
def program(strategy, config):
    def run(lm, keys, tokens, lengths):
        structure, world = begin(lm, tokens, lengths, config.max_new_tokens, cfg=config)
        return run_compiled(strategy, make_expand(config), lm, keys, world, structure)

    return jax.jit(run)


def search(model, strategy, prompts=PROMPTS, seed=0, **options):
    lm, cfg = model
    run = program(strategy, language(cfg, **options))
    structure, world = run(lm, keys_of(prompts, seed), *encode(prompts))
    check(structure)
    return structure, world


@functools.cache
def _dense(cfg):
    def run(params, tokens, mask):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        attend = make_dense_attend(cfg, key_mask=mask)
        hidden, _ = forward(params, tokens, positions, cfg=cfg, attend=attend)
        return hidden[0], jax.nn.log_softmax(unembed(params, hidden[0], cfg=cfg), -1)

    return jax.jit(run)


def dense(model, ids, width=96):
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    out = _dense(model[1])(model[0].policy, jnp.asarray(tokens), jnp.arange(width)[None] < len(ids))
    return [np.asarray(array)[: len(ids)] for array in out]


def path_ids(structure, world, row, node):
    ids = list(PROMPTS[row].encode())
    for step in path_to_root(structure, row, node)[1:]:
        length = int(structure.span_length[row, step])
        ids += [int(t) for t in world.tokens[row, step, :length]]
    return ids


def assert_same(first, second, exact=True):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if exact or a.dtype != np.float32:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=1e-5)


def host_search(model, strategy, config, on_round=None):
    lm, _ = model
    start = jax.jit(functools.partial(begin, cfg=config))
    structure, world = start(lm, *encode(PROMPTS), jnp.full(len(PROMPTS), LIMIT, jnp.int32))
    expand = jax.jit(make_expand(config))
    return run_host(strategy, expand, lm, keys_of(PROMPTS), world, structure, on_round)[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_compiled_and_host_driver_give_equal_structures(model, name):
    rounds = []
    by_host = host_search(
        model,
        STRATEGIES[name],
        language(model[1]),
        lambda number, structure: rounds.append(check(structure)),
    )
    compiled, _ = search(model, STRATEGIES[name])
    assert_same(by_host, compiled, exact=False)
    assert len(rounds) >= 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_seed_one_structure_and_one_compile(model, name):
    first, _ = search(model, STRATEGIES[name])
    again, _ = search(model, STRATEGIES[name])
    other, _ = search(model, STRATEGIES[name], seed=1)
    assert_same(first, again)
    assert not np.array_equal(first.logprob, other.logprob)
    assert program(STRATEGIES[name], language(model[1]))._cache_size() == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_problem_does_not_see_its_neighbours(model, name):
    together, _ = search(model, STRATEGIES[name])
    order = tuple(reversed(PROMPTS))
    turned, _ = search(model, STRATEGIES[name], order)
    assert_same(together, jax.tree.map(lambda a: a[::-1], turned), exact=False)


def test_a_problem_alone_is_searched_as_in_a_batch(model):
    together, _ = search(model, STRATEGIES["puct"])
    alone, _ = search(model, STRATEGIES["puct"], PROMPTS[2:3])
    assert_same(jax.tree.map(lambda a: a[2:3], together), alone, exact=False)


def test_every_node_equals_the_full_forward_of_its_path(model):
    """Hidden state, log-probability and token statistics of every node of a search."""
    structure, world = search(model, STRATEGIES["puct"])
    gaps = []
    for row in range(len(PROMPTS)):
        for node in range(1, int(structure.num_nodes[row])):
            if not structure.alive[row, node]:
                continue
            ids = path_ids(structure, world, row, node)
            hidden, logprobs = dense(model, ids)
            np.testing.assert_allclose(world.hidden[row, node], hidden[-1], atol=1e-4)
            begin_at = int(structure.span_start[row, node])
            assert len(ids) == begin_at + int(structure.span_length[row, node])
            step = sum(logprobs[t - 1, ids[t]] for t in range(begin_at, len(ids)))
            gaps.append(abs(float(structure.logprob[row, node]) - step))
            new = range(len(PROMPTS[row]), len(ids))
            shares, entropies, varentropies = [], [], []
            for t in new:
                top = np.sort(logprobs[t - 1])[::-1][:5]
                chosen = logprobs[t - 1, ids[t]]
                top = top if chosen >= top[-1] else np.append(top[:4], chosen)
                shares.append(np.exp(chosen) / np.exp(top).sum())
                surprise = -logprobs[t - 1].astype(np.float64)
                probs = np.exp(-surprise)
                entropies.append((probs * surprise).sum())
                varentropies.append((probs * (surprise - entropies[-1]) ** 2).sum())
            value = 4 * np.mean(shares) + 2 * np.exp(-np.mean(entropies))
            value = (value + np.exp(-np.mean(varentropies))) / 7
            np.testing.assert_allclose(structure.model_value[row, node], value, atol=1e-4)
    assert len(gaps) > 20
    assert max(gaps) < 1e-4


def test_deep_chains_equal_the_full_forward(model):
    """Paths of up to 120 tokens pass through every bucket of gathered context."""
    lm, cfg = model
    rule = lm.step_rule.replace(final=lm.step_rule.final & False)
    lm = dataclasses.replace(lm, step_rule=rule)
    config = dataclasses.replace(language(cfg), num_nodes=40, max_depth=39, max_new_tokens=120)
    assert (
        len(path_buckets(jax.eval_shape(lambda: begin(lm, *encode(PROMPTS), cfg=config)[1].pages)))
        == 3
    )
    run = program(greedy.make_greedy(39), config)
    structure, world = run(lm, keys_of(PROMPTS), *encode(PROMPTS))
    check(structure)
    for row in (0, 3):
        last = int(structure.num_nodes[row]) - 1
        ids = path_ids(structure, world, row, last)
        assert len(ids) == len(PROMPTS[row]) + 120
        hidden, _ = dense(model, ids, width=160)
        np.testing.assert_allclose(world.hidden[row, last], hidden[-1], atol=1e-4)


def test_tokens_forwarded_are_the_tokens_of_the_structure(model):
    for strategy in STRATEGIES.values():
        structure, _ = search(model, strategy)
        for row, prompt in enumerate(PROMPTS):
            used = slice(1, int(structure.num_nodes[row]))
            own = int(np.asarray(structure.span_length)[row, used].sum())
            forwarded = int(structure.budget.generated_tokens[row])
            forwarded += int(structure.budget.prefilled_tokens[row])
            assert forwarded == own + len(prompt)
        assert_same(structure.budget.forwarded_tokens, structure.budget.generated_tokens)


def test_tokens_that_beams_share_are_forwarded_once(model):
    """Two first tokens for six steps: what the steps hold may be spent, the network makes less."""
    sampling = SamplingConfig("stochastic_beam", temperature=1.5, top_k=2)
    config = dataclasses.replace(language(model[1], sampling=sampling), max_depth=1, num_nodes=7)
    one_round = puct.make_puct(num_children=6, max_depth=1, resample=False)
    structure, _ = program(one_round, config)(model[0], keys_of(PROMPTS), *encode(PROMPTS))
    assert_same(host_search(model, one_round, config), structure, exact=False)
    cost = jax.tree.map(np.asarray, structure.budget)
    assert (cost.generated_tokens == np.asarray(structure.span_length)[:, 1:].sum(-1)).all()
    assert (cost.forwarded_tokens <= cost.generated_tokens).all()
    assert (cost.forwarded_tokens < cost.generated_tokens).any()
    # Every call after the prompt's forwards a token, the first of them at most two.
    assert (cost.forwarded_tokens >= cost.model_calls - 1).all()
    assert (cost.forwarded_tokens <= 6 * (cost.model_calls - 1) - 4).all()


@pytest.mark.parametrize("evaluator", ["likelihood=3,consistency=2,none=1", "value_head=3,p_yes=1"])
def test_evaluators_equal_the_full_forward(model, evaluator):
    """In mixtures, for every program that is compiled costs more than all that is checked here."""
    lm, _ = model
    weights = parse_evaluator(evaluator)
    structure, world = search(model, STRATEGIES["puct"], evaluator=evaluator)
    seen = scored = 0
    for row in range(len(PROMPTS)):
        for node in range(1, int(structure.num_nodes[row])):
            finished = bool(structure.terminal[row, node])
            judged = bool(structure.alive[row, node])
            if not judged:
                continue
            ids = path_ids(structure, world, row, node)
            hidden, logprobs = dense(model, ids)
            values = {"none": 0.0}
            if "likelihood" in weights:
                new = range(len(PROMPTS[row]), len(ids))
                values["likelihood"] = np.exp(np.mean([logprobs[t - 1, ids[t]] for t in new]))
                values["consistency"] = _share_when_made(structure, row, node)
            else:
                suffix = [63, 10, 65] if finished else [257, 63, 10, 65]
                scored += len(suffix)
                table = dense(model, ids + suffix)[1][-1]
                yes, no = np.exp(table[[89, 121]]).sum(), np.exp(table[[78, 110]]).sum()
                values["p_yes"] = yes / (yes + no)
                head = apply_value_head(lm.value_head, jnp.asarray(hidden[-1]))
                values["value_head"] = float(head)
            expected = sum(weight * values[name] for name, weight in weights.items())
            expected /= sum(weights.values())
            np.testing.assert_allclose(structure.model_value[row, node], expected, atol=1e-4)
            seen += 1
    assert seen > 20
    assert int(structure.budget.scored_tokens.sum()) == scored


def _share_when_made(structure, row, node):
    """Self-consistency of a finished node among all that had finished by the end of its round."""
    if not structure.terminal[row, node]:
        return 0.0
    made = np.asarray(structure.created_at)[row]
    keys, terminal = np.asarray(structure.answer_key)[row], np.asarray(structure.terminal)[row]
    voters = terminal & (made <= made[node])
    return ((keys == keys[node]) & voters).sum() / voters.sum() if keys[node] else 0.0


def test_step_scores_are_aggregated_along_the_path(model):
    options = {"evaluator": "value_head", "aggregate": "mean"}
    mean, world = search(model, STRATEGIES["best_of_n"], **options)
    scores = np.asarray(apply_value_head(model[0].value_head, world.hidden))
    for row in range(len(PROMPTS)):
        for node in range(1, int(mean.num_nodes[row])):
            path = path_to_root(mean, row, node)[1:]
            steps = scores[row, path]
            np.testing.assert_allclose(mean.model_value[row, node], steps.mean(), atol=1e-5)


def test_duplicates_are_merged_and_take_no_pages(model):
    """At a low temperature siblings coincide; the copies are paid for, dead, and not searched."""
    cold = SamplingConfig(temperature=0.05)
    structure, world = search(model, STRATEGIES["puct"], sampling=cold)
    s = jax.tree.map(np.asarray, structure)
    copies = 0
    for row in range(len(PROMPTS)):
        said = {}
        for node in range(1, s.num_nodes[row]):
            step = tuple(np.asarray(world.tokens[row, node, : s.span_length[row, node]]))
            first = said.setdefault((s.parent[row, node], step), node)
            assert s.alive[row, node] == (first == node)
            copies += first != node
            if first != node:
                assert s.visits[row, node] == 0
                assert int(world.pages.table_length[row, node]) == int(
                    world.pages.table_length[row, s.parent[row, node]]
                )
    assert copies > 0


@pytest.mark.slow
def test_diverse_beams_are_distinct_siblings(model):
    beams = SamplingConfig("diverse_beam", diversity=50.0)
    structure, world = search(model, STRATEGIES["puct"], sampling=beams)
    first = np.asarray(world.tokens)[:, 1:4, 0]
    assert all(len(set(row)) == 3 for row in first.tolist())
    assert np.asarray(structure.alive)[:, 1:4].all()


def test_the_search_stays_on_the_device_and_copies_no_pool(model):
    lm, cfg = model
    config = language(cfg)
    tokens, lengths = encode(PROMPTS)
    structure, world = jax.eval_shape(
        functools.partial(begin, cfg=config), lm, tokens, lengths, jnp.zeros_like(lengths)
    )
    expand = make_expand(config)

    def run(lm, keys, world, structure):
        return run_compiled(STRATEGIES["puct"], expand, lm, keys, world, structure)

    compiled = jax.jit(run, donate_argnums=2).lower(lm, keys_of(PROMPTS), world, structure)
    compiled = compiled.compile()
    text = compiled.as_text()
    assert hlo.host_transfers(text) == []
    pool = f"f32[{','.join(map(str, world.pages.pools[0].shape))}]"
    assert pool in text
    assert not [one for one in hlo.copies(hlo.instructions(text)) if pool in one.type]
    world_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(world))
    assert compiled.memory_analysis().alias_size_in_bytes >= world_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluator": "vibes"}, "vibes"),
        ({"evaluator": "value_head", "value_fn": None}, "value_head"),
        ({"aggregate": "median"}, "median"),
        ({"num_nodes": 0}, "num_nodes must be >= 1, got 0"),
        ({"page_tokens": -8}, "page_tokens must be >= 1, got -8"),
    ],
)
def test_bad_settings_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**{"model": preset("tiny-llama"), **changes})


def test_a_prompt_of_no_whole_pages_is_refused(model):
    lm, cfg = model
    with pytest.raises(ValueError, match="prompt width 23 is no multiple of page_tokens=4"):
        begin(lm, jnp.zeros((1, 23), jnp.int32), jnp.ones(1, jnp.int32), cfg=language(cfg))
