"""Chains that write no step twice from one state: with a task that names states, or none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_language import PROMPTS, encode, keys_of, language
from test_language_task import begin_problem, make_tables, weigh

from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.language import begin, find_tried, make_expand
from rlm_jax.reasoning.language_world import Rows
from rlm_jax.reasoning.strategies import best_of_n
from rlm_jax.reasoning.strategies.best_first import make_best_first
from rlm_jax.reasoning.structure import check, path_to_root
from rlm_jax.tasks.device import DeviceTask, StepCheck

LONG, NUM_STATES = 24, 8


def check_step(tables, state, tokens, length, ends):
    """Every step follows, and leads to one of a few states."""
    del ends
    total = (state["sum"] + weigh(tables[tokens], length)) % NUM_STATES
    after = {"sum": total, "steps": state["steps"] + 1}
    return StepCheck(after, length > 0, length < 0, state_key(after))


def state_key(state):
    return (1 + state["sum"] % NUM_STATES).astype(jnp.uint32)


TASK = DeviceTask(make_tables, begin_problem, check_step, state_key)


@functools.cache
def program(config, num_chains, max_refused):
    strategy = best_of_n.make_best_of_n(num_chains, LONG, max_refused=max_refused)

    def run(lm, keys, tokens, lengths):
        structure, world = begin(lm, tokens, lengths, config.max_new_tokens, cfg=config)
        return run_compiled(strategy, make_expand(config), lm, keys, world, structure)

    return jax.jit(run)


def search(model, num_chains=1, task=None, max_refused=0, may_err=False, **sampling):
    """Structures of chains that never end by themselves, their world, and the config."""
    lm, cfg = model
    rule = lm.step_rule.replace(final=lm.step_rule.final & False)
    lm = dataclasses.replace(lm, step_rule=rule, task_tables=make_tables(range(cfg.vocab_size)))
    num_nodes = 1 + num_chains * (LONG + max_refused)
    sizes = {"num_nodes": num_nodes, "max_depth": LONG, "max_new_tokens": 1000}
    sizes["may_err"] = may_err
    config = language(cfg, "confidence", SamplingConfig(**sampling), task=task, may_return=True)
    config = dataclasses.replace(config, **sizes)
    structure, world = program(config, num_chains, max_refused)(
        lm, keys_of(PROMPTS), *encode(PROMPTS)
    )
    check(structure)
    return structure, world, config


def read_chains(structure, world):
    """Of each chain: (state before, step, state behind) of its steps, in order."""
    s, tokens = jax.tree.map(np.asarray, (structure, world.tokens))
    chains = []
    for row in range(len(PROMPTS)):
        leaves = set(range(1, s.num_nodes[row])) - set(s.parent[row, : s.num_nodes[row]].tolist())
        for leaf in sorted(leaves):
            path = path_to_root(s, row, leaf)
            lengths = s.span_length[row]
            steps = [tuple(tokens[row, node, : lengths[node]].tolist()) for node in path[1:]]
            states = s.state_key[row, path].tolist()
            chains.append(list(zip(states, steps, states[1:], strict=False)))
    return chains


def check_some(tables, state, tokens, length, ends):
    """As `check_step`; but half of the steps, told by their tokens, are against the rules."""
    checked = check_step(tables, state, tokens, length, ends)
    return checked._replace(legal=weigh(tables[tokens], length) % 2 == 0)


def test_a_chain_that_may_err_goes_on_where_a_step_says_what_it_leaves(model):
    """As if each of its steps followed; those that do not say so still end it."""

    def claim(least):
        def check(*args):
            checked = check_some(*args)
            says = checked.state["sum"] >= least
            return checked._replace(claims=~checked.legal & says)

        return TASK._replace(step=check)

    options = {"method": "greedy", "no_repeats": True}
    free, world, _ = search(model, task=TASK, **options)
    erring, erring_world, _ = search(model, task=claim(0), may_err=True, **options)
    assert free.num_nodes.tolist() == erring.num_nodes.tolist()
    np.testing.assert_array_equal(free.state_key, erring.state_key)
    np.testing.assert_array_equal(world.tokens, erring_world.tokens)
    strict, _, _ = search(model, task=claim(0), **options)
    some, _, _ = search(model, task=claim(2), may_err=True, **options)
    made = [int(structure.alive.sum()) for structure in (strict, some, erring)]
    assert made == sorted(set(made))


def test_a_refused_step_is_not_written_again(model):
    task = TASK._replace(step=check_some)
    options = {"task": task, "method": "greedy", "no_repeats": True}
    plain, _, _ = search(model, **options)
    structure, world, _ = search(model, max_refused=30, **options)
    s, tokens = jax.tree.map(np.asarray, (structure, world.tokens))
    some_refused_twice = False
    for row, made in enumerate(s.num_nodes):
        assert made >= plain.num_nodes[row]
        tried = {}
        for node in range(1, made):
            step = tuple(tokens[row, node, : s.span_length[row, node]].tolist())
            assert s.alive[row, node] == (sum(step) % 2 == 0)
            if not s.alive[row, node]:
                state = s.state_key[row, s.parent[row, node]]
                assert step not in tried.setdefault(state, set())
                tried[state].add(step)
        some_refused_twice |= max(map(len, tried.values())) > 1
    assert some_refused_twice
    # Without a second try the first one that is refused ends a chain.
    for made, alive in zip(plain.num_nodes, np.asarray(plain.alive), strict=True):
        assert alive[: made - 1].all()
    assert np.asarray(plain.num_nodes).min() < s.num_nodes.min()


@functools.cache
def widen(config):
    strategy = make_best_first(num_children=1, max_depth=3, prior_weight=0.5, widen=True)

    def run(lm, keys, tokens, lengths):
        structure, world = begin(lm, tokens, lengths, config.max_new_tokens, cfg=config)
        return run_compiled(strategy, make_expand(config), lm, keys, world, structure)

    return jax.jit(run)


def test_a_node_that_is_widened_writes_no_step_twice(model):
    """Greedily, one step a turn: without `no_repeats` all of a node's steps would be the same."""
    lm, cfg = model
    written = {}
    for no_repeats in (False, True):
        sampling = SamplingConfig("greedy", no_repeats=no_repeats)
        config = language(cfg, "likelihood", sampling)
        config = dataclasses.replace(config, num_nodes=40, max_depth=3, max_new_tokens=400)
        structure, world = widen(config)(lm, keys_of(PROMPTS), *encode(PROMPTS))
        check(structure)
        s, tokens = jax.tree.map(np.asarray, (structure, world.tokens))
        steps = written[no_repeats] = {}
        for row, made in enumerate(s.num_nodes):
            for node in range(1, made):
                step = tuple(tokens[row, node, : s.span_length[row, node]].tolist())
                steps.setdefault((row, s.parent[row, node]), []).append(step)
    assert max(len(steps) for steps in written[True].values()) > 3
    assert all(len(steps) == len(set(steps)) for steps in written[True].values())
    assert any(len(steps) > len(set(steps)) for steps in written[False].values())
    # A node's first step is the greedy one either way.
    both = written[True].keys() & {key for key in written[False] if key[1] == 0}
    assert all(written[True][key][0] == written[False][key][0] for key in both)


def collect_tried(chain):
    """Steps that were written from each state, those apart that led back; and the repeats."""
    tried, seen, repeats = set(), {chain[0][0]} - {0}, 0
    for before, step, behind in chain:
        repeats += (before, step) in tried
        if behind not in seen:
            tried.add((before, step))
        seen |= {behind} - {0}
    return tried, repeats


def count_repeats(chains):
    return [collect_tried(chain)[1] for chain in chains]


@pytest.mark.parametrize(
    ("num_chains", "sampling"),
    [(1, {"method": "greedy"}), (2, {"method": "sample", "temperature": 0.1})],
    ids=["greedy", "sampled"],
)
def test_without_a_task_no_step_comes_twice(model, num_chains, sampling):
    usual = read_chains(*search(model, num_chains, **sampling)[:2])
    assert sum(count_repeats(usual)) > 5
    found = read_chains(*search(model, num_chains, no_repeats=True, **sampling)[:2])
    assert len(found) == len(PROMPTS) * num_chains
    assert count_repeats(found) == [0] * len(found)
    # Nothing else changes: up to its first repeat a greedy chain is what it was.
    if num_chains == 1:
        for ours, theirs in zip(found, usual, strict=True):
            steps = [step for _, step, _ in theirs]
            repeats = (i for i in range(len(steps)) if steps[i] in steps[:i])
            first = next(repeats, len(steps))
            assert [step for _, step, _ in ours[:first]] == steps[:first]


def test_with_a_task_steps_are_tried_from_states(model):
    """What is taken from the next step of each chain, against the chain's own text."""
    structure, world, config = search(
        model, task=TASK, method="sample", temperature=1.5, no_repeats=True
    )
    chains = read_chains(structure, world)
    assert count_repeats(chains) == [0] * len(PROMPTS)
    # Each of a few states was left by a step at most: the others led back.
    find = jax.jit(lambda *args: find_tried(config, *args[:2], Rows(args[2], 1)))
    found_any = 0
    for depth in (1, 6, 15, LONG - 1):  # A chain's node is as deep as its number.
        lanes = jnp.full((len(PROMPTS), 1), depth, jnp.int32)
        tried = jax.tree.map(np.asarray, find(world, structure, lanes))
        for row, chain in enumerate(chains):
            here = chain[depth - 1][2]
            wanted = {step for before, step in collect_tried(chain[:depth])[0] if before == here}
            lengths = tried.length[row]
            found = [tuple(tried.tokens[row, i, :n].tolist()) for i, n in enumerate(lengths) if n]
            assert sorted(found) == sorted(wanted)
            found_any += len(found)
    assert found_any > 3


@pytest.mark.parametrize("num_chains", [1, 2])
def test_a_step_that_goes_back_spells_what_was_left(model, num_chains):
    """Against the chain's own text: behind a mark of its prompt or of a step."""
    states = jnp.arange(1, NUM_STATES + 1).astype(jnp.uint32)
    task = TASK._replace(
        returns=lambda tables: tables % 4 == 0,
        marks=lambda tables: tables % 4 == 1,
        left=lambda state: jnp.where(states != state_key(state), states, 0),
    )
    options = {"task": task, "method": "sample", "temperature": 1.5}
    counts = {}
    for copied in (False, True):
        structure, world, _ = search(model, num_chains, copy_returns=copied, **options)
        tokens, lengths = map(np.asarray, encode(PROMPTS))
        prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        right = wrong = 0
        for number, chain in enumerate(read_chains(structure, world)):
            prompt = prompts[number // num_chains].tolist()[-world.tokens.shape[-1] :]
            told = [(chain[0][0], tuple(prompt))]
            for before, step, behind in chain:
                texts = [_spelled(text) for state, text in told if state != before]
                if step[0] % 4 == 0:
                    # One of the two may have been cut short.
                    fits = any(t and all(map(int.__eq__, t, step[1:])) for t in texts)
                    right, wrong = right + fits, wrong + (not fits)
                told.append((behind, step))
        counts[copied] = right, wrong
    assert counts[False][1] > 10
    assert counts[True][0] > 10
    assert counts[True][1] == 0


def _spelled(text):
    """What stands behind the last mark of a step."""
    marked = [place for place, token in enumerate(text) if token % 4 == 1]
    return text[marked[-1] + 1 :] if marked else ()
