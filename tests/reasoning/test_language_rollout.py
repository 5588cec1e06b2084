"""Rollouts and mixtures: values against full forwards done by hand, and their cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_language import LIMIT, PROMPTS, assert_same, dense, encode, keys_of, language, path_ids
from test_language_search import assert_no_page_leaks
from test_language_task import GO_ON, MODULUS, TASK, make_tables

from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.heads import apply_value_head
from rlm_jax.models.presets import preset
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.language import LanguageConfig, begin, make_expand
from rlm_jax.reasoning.language_values import parse_evaluator, write_evaluator
from rlm_jax.reasoning.operators.evaluate import average_rollouts, mix_values
from rlm_jax.reasoning.strategies import best_of_n, puct
from rlm_jax.reasoning.structure import check
from rlm_jax.tasks.device import DeviceTask, StepCheck
from rlm_jax.text.answers import answer_key, init_answer_state, make_answer_rule, update_answer
from rlm_jax.text.tokenizer import ByteTokenizer

# Two minutes of compiling.
pytestmark = pytest.mark.slow

TREE = {"num_children": 3, "num_lanes": 2, "max_depth": 3}
PUCT = puct.make_puct(**TREE)
CHAINS = best_of_n.make_best_of_n(3, 3)
ONE_ROUND = puct.make_puct(num_children=3, max_depth=1, resample=False)
# Siblings differ and nothing is left to chance: one rollout of a path is greedy decoding.
GREEDY = SamplingConfig("diverse_beam", diversity=50.0)
ROLLOUT = {"evaluator": "rollout", "num_rollouts": 1, "rollout_tokens": 18}
CHECKED = {"task": TASK, "dead_value": -0.25}


@functools.cache
def program(strategy, config):
    def run(lm, keys, tokens, lengths, limits):
        structure, world = begin(lm, tokens, lengths, limits, cfg=config)
        expand = make_expand(config)
        return run_compiled(strategy, expand, lm, keys, world, structure, limits=GO_ON)

    return jax.jit(run)


def configure(cfg, **options):
    changes = {"max_new_tokens": 12 * LIMIT, "num_nodes": 22, "sampling": GREEDY} | options
    made = language(cfg, "value_head")
    if "value_head" not in changes["evaluator"]:
        made = dataclasses.replace(made, evaluator="none", value_fn=None)
    return dataclasses.replace(made, **changes)


def search(model, strategy=PUCT, prompts=PROMPTS, limit=12 * LIMIT, lm=None, **options):
    own, cfg = model
    lm = dataclasses.replace(lm or own, task_tables=make_tables(range(cfg.vocab_size)))
    config = configure(cfg, **options)
    limits = jnp.full(len(prompts), limit, jnp.int32)
    run = program(strategy, config)
    structure, world = run(lm, keys_of(prompts), *encode(prompts), limits)
    check(structure)
    return structure, world, config


def roll_by_hand(model, ids, total, num_tokens):
    """Greedy steps behind `ids`: how many, of how many tokens, and how it ended.

    `total` is the task's state, None without a task. Returns steps, tokens, solved, finished, ids.
    """
    rule = jax.tree.map(np.asarray, model[0].step_rule)
    new, steps, step = [], 0, []
    while len(new) < num_tokens:
        token = int(dense(model, ids + new)[1][-1].argmax())
        new.append(token)
        step.append(token)
        final = bool(rule.final[token])
        cut = len(new) == num_tokens
        if not (final or rule.ends_alone[token] or len(step) == rule.max_tokens or cut):
            continue
        steps += 1
        if total is not None:
            legal = sum(step) % 3 != 0
            total = (total + sum(step)) % MODULUS
            if not legal or step[-1] % 9 == 1:
                return steps, len(new), legal, True, ids + new
        if final:
            return steps, len(new), False, True, ids + new
        step = []
    return steps, len(new), False, False, ids + new


def task_state(world, row, node):
    return int(world.task_state["sum"][row, node])


@pytest.mark.parametrize("judge", ["expansion", "visit"])
def test_a_value_is_what_comes_of_the_path(model, judge):
    strategy = puct.make_puct(**TREE, judge=judge, num_simulations=5)
    structure, world, _ = search(
        model, strategy, judge=judge, rollout_discount=0.5, **ROLLOUT, **CHECKED
    )
    values, steps_seen = set(), set()
    for row in range(len(PROMPTS)):
        spent = checks = 0
        for node in range(int(structure.num_nodes[row])):
            judged = (structure.visits[row, node] > 0) & structure.alive[row, node]
            judged &= ~structure.terminal[row, node]
            if not judged or (judge == "expansion" and node == 0):
                continue
            ids = path_ids(structure, world, row, node)
            state = task_state(world, row, node)
            steps, tokens, solved, _, _ = roll_by_hand(model, ids, state, 18)
            expected = 0.5**steps * (1.0 if solved else -0.25)
            np.testing.assert_allclose(structure.model_value[row, node], expected, atol=1e-6)
            spent, checks = spent + tokens, checks + steps
            values.add(expected)
            steps_seen.add(steps)
        assert structure.budget.rollout_tokens[row] == spent
        made = int((np.asarray(structure.span_length)[row, 1:] > 0).sum())
        assert structure.budget.verifier_calls[row] == checks + made
    assert min(values) < 0 < max(values)
    assert len(steps_seen) > 1
    assert_no_page_leaks(structure, world)


@pytest.mark.slow
def test_beams_roll_out_one_by_one(model):
    """Two beams of one node would change places, and with them what stands behind them."""
    beams = ROLLOUT | {"num_rollouts": 2, "sampling": SamplingConfig("beam")}
    structure, world, _ = search(model, ONE_ROUND, **beams, **CHECKED)
    judged = 0
    for row in range(len(PROMPTS)):
        for node in range(1, 4):
            if structure.terminal[row, node] or not structure.alive[row, node]:
                continue
            ids, state = path_ids(structure, world, row, node), task_state(world, row, node)
            solved = roll_by_hand(model, ids, state, 18)[2]
            assert structure.model_value[row, node] == (1.0 if solved else -0.25)
            judged += 1
    assert judged > 4


@pytest.mark.slow
def test_without_a_task_a_value_is_the_agreement_of_answers(model):
    """One round: what the first steps and their rollouts finish with are the only votes."""
    strategy = puct.make_puct(num_children=6, max_depth=1, resample=False)
    final = model[0].step_rule.final | (jnp.arange(model[1].vocab_size) % 3 == 0)
    lm = dataclasses.replace(model[0], step_rule=model[0].step_rule.replace(final=final))
    structure, world, _ = search(model, strategy, lm=lm, **ROLLOUT)
    changed = (lm, model[1])
    values = set()
    for row in range(len(PROMPTS)):
        ended = []
        for node in range(1, 7):
            ids = path_ids(structure, world, row, node)
            finished = bool(structure.terminal[row, node])
            if not finished:
                *_, finished, ids = roll_by_hand(changed, ids, None, 18)
            ended.append((finished, answer_of(ids[len(PROMPTS[row]) :])))
        votes = [answer for finished, answer in ended if finished]
        for node, (finished, answer) in enumerate(ended, 1):
            share = votes.count(answer) / len(votes) if finished and answer is not None else 0.0
            np.testing.assert_allclose(structure.model_value[row, node], share, atol=1e-6)
            values.add(share)
    assert len(values) > 1


def answer_of(ids):
    """What the ids state, read one by one by the answer automaton."""
    rule, state = make_answer_rule(ByteTokenizer()), init_answer_state(jnp.zeros(1, jnp.int32))
    for token in ids:
        state = update_answer(rule, state, jnp.asarray([token]))
    return int(answer_key(state)[0]) or None


SOME_ROLLOUTS = {
    "evaluator": "rollout",
    "num_rollouts": 2,
    "rollout_tokens": 9,
    "sampling": SamplingConfig(temperature=1.5),
}


def test_rollouts_leave_no_trace_but_values_and_cost(model):
    """Chains grow whatever they are worth: with rollouts or without, the same tokens and states."""
    rolled, world, _ = search(model, CHAINS, **SOME_ROLLOUTS, **CHECKED)
    plain, other, _ = search(model, CHAINS, **(SOME_ROLLOUTS | {"evaluator": "none"}), **CHECKED)
    assert_same(world, other, exact=False)
    for name in ("parent", "span_length", "terminal", "proven", "state_key", "logprob"):
        assert_same(getattr(rolled, name), getattr(plain, name), exact=False)
    cost = jax.tree.map(np.asarray, rolled.budget)
    assert (cost.rollout_tokens > 0).all()
    assert (cost.generated_tokens - cost.rollout_tokens == plain.budget.generated_tokens).all()
    assert_no_page_leaks(rolled, world)


def test_rollouts_do_not_see_their_neighbours(model):
    together, *_ = search(model, CHAINS, **SOME_ROLLOUTS, **CHECKED)
    turned, *_ = search(model, CHAINS, tuple(reversed(PROMPTS)), **SOME_ROLLOUTS, **CHECKED)
    assert_same(together, jax.tree.map(lambda a: a[::-1], turned), exact=False)


@pytest.mark.parametrize("limit", [1, 10, 40])
def test_the_budget_caps_rollouts(model, limit):
    structure, *_ = search(model, CHAINS, limit=limit, **SOME_ROLLOUTS, **CHECKED)
    assert (structure.budget.generated_tokens <= limit).all()
    assert (structure.budget.generated_tokens > 0).all()
    if limit == 40:
        assert (structure.budget.rollout_tokens > 0).all()


@pytest.mark.slow
def test_many_rollouts_approach_the_probability_of_a_solution(model):
    """Steps of one token; a node is solved by ids below 50 and lost otherwise."""

    def check_step(tables, state, tokens, length, ends):
        del tables, ends
        right = (tokens[0] < 50) & (state > 0)
        key = jnp.uint32(1)
        return StepCheck(state + 1, right | (state == 0), right & (length > 0), key)

    task = DeviceTask(make_tables, lambda tables, prompt, length: length * 0, check_step)
    rule = model[0].step_rule.replace(max_tokens=1)
    lm = dataclasses.replace(model[0], step_rule=rule)
    structure, world, _ = search(
        model,
        ONE_ROUND,
        lm=lm,
        sampling=SamplingConfig(temperature=1.0),
        evaluator="rollout",
        num_rollouts=300,
        rollout_tokens=1,
        max_new_tokens=2000,
        limit=2000,
        task=task,
    )
    seen = 0
    for row in range(len(PROMPTS)):
        for node in range(1, 4):
            if structure.terminal[row, node] or not structure.alive[row, node]:
                continue
            logprobs = dense(model, path_ids(structure, world, row, node))[1][-1]
            chance = np.exp(logprobs[:50]).sum()
            gap = abs(float(structure.model_value[row, node]) - chance)
            assert gap < 5 * np.sqrt(chance * (1 - chance) / 300)
            seen += 1
    assert seen > 2


@pytest.mark.slow
def test_a_mixture_is_made_of_its_parts(model):
    lone, *_ = search(model, ONE_ROUND, **ROLLOUT, **CHECKED)
    mixture = ROLLOUT | {"evaluator": "value_head=1,rollout=3"}
    mixed, world, _ = search(model, ONE_ROUND, **mixture, **CHECKED)
    head = np.asarray(apply_value_head(model[0].value_head, world.hidden))
    wanted = (head + 3 * np.asarray(lone.model_value)) / 4
    mixes = np.array(mixed.alive & ~mixed.terminal)
    mixes[:, 0] = False
    assert mixes.sum() > 4
    np.testing.assert_allclose(np.asarray(mixed.model_value)[mixes], wanted[mixes], atol=1e-6)
    assert_same(mixed.budget, lone.budget)


def test_rollout_average_golden_g08():
    rewards, steps = jnp.asarray([1.0, -1.0, 1.0]), jnp.asarray([2, 3, 1])
    made = jnp.ones(3, bool)
    value = average_rollouts(rewards, steps, made, discount=0.95)
    np.testing.assert_allclose(value, 0.331708, atol=1e-6)
    # Seen from the state behind the step, each is one step nearer to its end.
    np.testing.assert_allclose(
        average_rollouts(rewards, steps - 1, made, discount=0.95), 0.349167, atol=1e-6
    )
    binary = average_rollouts(jnp.maximum(rewards, 0), steps, made, discount=1.0)
    np.testing.assert_allclose(binary, 2 / 3, atol=1e-6)
    assert average_rollouts(rewards, steps, ~made, discount=1.0) == 0


def test_mixtures_golden_g34():
    useful, confident = jnp.asarray([0.6, 0.0, -0.5]), jnp.asarray([0.8, 1.0, 0.3])
    np.testing.assert_allclose(
        mix_values([useful, confident], [2.0, 2.0], "geometric"), [0.69282, 0, 0], atol=1e-5
    )
    np.testing.assert_allclose(
        mix_values([useful, confident], [1.0, 3.0]), [0.75, 0.75, 0.1], atol=1e-6
    )
    # A weight of nothing leaves the other alone.
    np.testing.assert_allclose(mix_values([useful, confident], [0.0, 1.0], "geometric"), confident)
    with pytest.raises(ValueError, match="harmonic"):
        mix_values([useful], [1.0], "harmonic")


def test_an_evaluator_setting_is_read_as_it_is_written():
    assert parse_evaluator("confidence") == {"confidence": 1.0}
    weights = {"value_head": 0.5, "rollout": 2.0}
    assert parse_evaluator(" value_head=0.5, rollout=2") == parse_evaluator(weights) == weights
    assert parse_evaluator(write_evaluator(weights)) == weights
    assert write_evaluator({"none": 1.0}) == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluator": "rollout=1,vibes=2"}, "'vibes'"),
        ({"evaluator": "rollout=1,rollout=2"}, "named twice"),
        ({"evaluator": "rollout=much"}, "rollout='much': accepted is a number"),
        ({"evaluator": "rollout=-1"}, "rollout='-1': accepted is a number >= 0"),
        ({"evaluator": "rollout=nan"}, "rollout='nan'"),
        ({"evaluator": "rollout=0,none=0"}, "must sum to more than 0"),
        ({"evaluator": ""}, "evaluator ''"),
        ({"evaluator": "rollout,p_yes", "aggregate": "min"}, "accepted is last"),
        ({"evaluator": "rollout,value_head"}, "value_fn=None"),
        ({"mixture": "median"}, "median"),
        ({"num_rollouts": 0}, "num_rollouts must be >= 1, got 0"),
        ({"rollout_tokens": 0}, "rollout_tokens must be >= 1, got 0"),
        ({"rollout_discount": 1.5}, "rollout_discount must be in"),
    ],
)
def test_bad_settings_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**{"model": preset("tiny-llama"), **changes})
