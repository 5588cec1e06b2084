"""A task that checks steps on token ids, inside a search over a tiny model.

Every verdict is recomputed in plain Python from the tokens that the nodes hold.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_language import LIMIT, PROMPTS, encode, keys_of, language

from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.heads import apply_value_head
from rlm_jax.models.state_value import StateValueConfig, apply_state_value, init_state_value
from rlm_jax.reasoning import language_lookahead
from rlm_jax.reasoning.drive import Limits, run_compiled
from rlm_jax.reasoning.language import begin, keep_world, make_expand
from rlm_jax.reasoning.operators.structure import keep_subtree
from rlm_jax.reasoning.operators.traversal import select_answer
from rlm_jax.reasoning.strategies import best_of_n, puct
from rlm_jax.reasoning.structure import check, has_child
from rlm_jax.tasks.device import DeviceTask, Observation, StepCheck

MODULUS = 4
GO_ON = Limits(proven=False)


def weigh(tokens, length):
    """Sum of the first `length` token ids."""
    return jnp.where(jnp.arange(tokens.shape[0]) < length, tokens, 0).sum()


def begin_problem(tables, prompt, length):
    return {"sum": weigh(tables[prompt], length) % MODULUS, "steps": jnp.int32(0)}


def check_step(tables, state, tokens, length, ends):
    """A step follows unless its sum is a multiple of 3; it solves if the last id is 1 modulo 9."""
    del ends
    total = weigh(tables[tokens], length)
    after = {"sum": (state["sum"] + total) % MODULUS, "steps": state["steps"] + 1}
    last = tokens[jnp.maximum(length - 1, 0)]
    key = (1 + after["sum"]).astype(jnp.uint32)
    return StepCheck(after, total % 3 != 0, last % 9 == 1, key)


def make_tables(token_bytes):
    return jnp.arange(len(token_bytes), dtype=jnp.int32)


TASK = DeviceTask(make_tables, begin_problem, check_step)
TREE = {"num_children": 3, "num_lanes": 2, "max_depth": 4}
PUCT = puct.make_puct(**TREE)


@functools.cache
def program(strategy, config, limits):
    def run(lm, keys, tokens, lengths):
        structure, world = begin(lm, tokens, lengths, config.max_new_tokens, cfg=config)
        return run_compiled(
            strategy, make_expand(config), lm, keys, world, structure, limits=limits
        )

    return jax.jit(run)


def search(model, strategy=PUCT, limits=GO_ON, **options):
    """A finished search with the task, checked, as numpy arrays; and the config it ran with."""
    lm, cfg = model
    lm = dataclasses.replace(lm, task_tables=make_tables(range(cfg.vocab_size)))
    sizes = {"num_nodes": 40, "max_new_tokens": 2 * LIMIT, "task": TASK, "dead_value": -0.25}
    evaluator = options.pop("evaluator", "confidence")
    config = dataclasses.replace(language(cfg, evaluator), **sizes | options)
    run = program(strategy, config, limits)
    structure, world = run(lm, keys_of(PROMPTS), *encode(PROMPTS))
    check(structure)
    return structure, world, config


class Oracle:
    """What the task says of every node of a structure, from the tokens alone."""

    def __init__(self, model, structure, world, config, row):
        self.final = np.asarray(model[0].step_rule.final)
        self.s = jax.tree.map(lambda array: np.asarray(array)[row], structure)
        self.tokens = np.asarray(world.tokens)[row]
        self.sums = {0: sum(PROMPTS[row].encode()) % MODULUS}
        self.illegal, self.solved, self.ends, self.alive = {}, {}, {}, {0: True}
        self.made = [i for i in range(1, self.s.num_nodes) if self.s.span_length[i]]
        for node in self.made:
            step = self.step(node)
            parent = int(self.s.parent[node])
            self.sums[node] = (self.sums[parent] + sum(step)) % MODULUS
            self.illegal[node] = sum(step) % 3 == 0
            self.solved[node] = not self.illegal[node] and step[-1] % 9 == 1
            self.ends[node] = bool(self.final[step[-1]])
            twins = [i for i in self.made if i < node and self.s.parent[i] == parent]
            twin = any(self.alive[i] and self.equal(i, node) for i in twins)
            self.alive[node] = not twin and not (self.illegal[node] and config.drop_illegal)

    def step(self, node):
        return self.tokens[node, : self.s.span_length[node]].tolist()

    def goes_on(self, node):
        return not (self.illegal[node] or self.solved[node] or self.ends[node])

    def dead_end(self, node):
        """Steps were written from the node, and none of them follows."""
        steps = [i for i in self.made if self.s.parent[i] == node]
        return bool(steps) and all(self.illegal[i] for i in steps)

    def equal(self, one, other):
        if self.step(one) == self.step(other):
            return True
        both = self.goes_on(one) and self.goes_on(other)
        return both and self.sums[one] == self.sums[other]


def oracles(model, structure, world, config):
    return [Oracle(model, structure, world, config, row) for row in range(len(PROMPTS))]


@pytest.mark.parametrize("drop_illegal", [True, False])
def test_every_verdict_is_that_of_the_tokens(model, drop_illegal):
    structure, world, config = search(
        model, drop_illegal=drop_illegal, solved_reward=0.0 if drop_illegal else 0.5
    )
    seen = {"illegal": 0, "solved": 0, "failed": 0, "open": 0, "merged": 0}
    dead_ends = 0
    confidence, starts = np.asarray(world.path_confidence), np.asarray(world.prompt_length)
    for row, oracle in enumerate(oracles(model, structure, world, config)):
        s = oracle.s
        assert s.budget.verifier_calls == len(oracle.made)
        for node in oracle.made:
            alive, solved = oracle.alive[node], oracle.solved[node]
            goes_on = oracle.goes_on(node)
            assert s.alive[node] == alive
            assert s.terminal[node] == (alive and not goes_on)
            assert s.proven[node] == (alive and solved)
            assert s.reward[node] == config.solved_reward * solved
            assert s.state_key[node] == (1 + oracle.sums[node] if goes_on else 0)
            if not (goes_on or solved):
                assert s.answer_key[node] == 0
            seen["merged"] += goes_on and not alive
            seen["illegal"] += oracle.illegal[node]
            seen["solved"] += solved
            seen["failed"] += oracle.ends[node] and not solved and not oracle.illegal[node]
            seen["open"] += goes_on
            if not alive:
                continue
            assert np.asarray(world.task_state["sum"])[row, node] == oracle.sums[node]
            assert np.asarray(world.task_state["steps"])[row, node] == s.depth[node]
            new = s.span_start[node] + s.span_length[node] - starts[row]
            mean = confidence[row, node] / new
            dead_end = drop_illegal and oracle.dead_end(node)
            dead_ends += dead_end
            expected = 1.0 if solved else mean if goes_on and not dead_end else -0.25
            np.testing.assert_allclose(s.model_value[node], expected, atol=1e-6)
    assert min(seen.values()) > 2, seen
    assert (dead_ends > 0) == drop_illegal


def test_dropped_steps_take_no_pages(model):
    structure, world, config = search(model)
    length = np.asarray(world.pages.table_length)
    dropped = 0
    for row, oracle in enumerate(oracles(model, structure, world, config)):
        for node in oracle.made:
            if not oracle.alive[node]:
                assert length[row, node] == length[row, oracle.s.parent[node]]
                dropped += oracle.illegal[node]
    assert dropped > 5


def test_a_search_stops_at_a_proven_solution(model):
    structure, *_ = search(model, limits=Limits())
    longer, *_ = search(model)
    proven = np.asarray(structure.proven.any(-1))
    assert proven.any()
    assert (structure.num_nodes <= longer.num_nodes).all()
    assert (np.asarray(structure.num_nodes) < np.asarray(longer.num_nodes))[proven].any()
    answer = select_answer(structure, jnp.full_like(structure.depth, -1), "best")
    for row in np.flatnonzero(proven):
        assert structure.proven[row, answer.node[row]]


@pytest.mark.slow
def test_a_solution_may_bring_a_reward(model):
    structure, *_ = search(model, drop_illegal=False, solved_reward=0.5)
    assert structure.proven.any()
    assert (structure.reward == 0.5 * structure.proven)[structure.alive].all()


@pytest.mark.slow
def test_equal_steps_of_chains_stay_apart(model):
    strategy = best_of_n.make_best_of_n(6, 4)
    structure, world, config = search(model, strategy, drop_illegal=False)
    twins = 0
    for oracle in oracles(model, structure, world, config):
        for node in oracle.made:
            assert oracle.s.alive[node]
            twins += not oracle.alive[node]
    assert twins > 0


@pytest.mark.parametrize("rule", ["majority", "weighted", "best"])
def test_what_is_refuted_is_no_answer_while_another_leaf_states_one(model, rule):
    structure, *_ = search(model, drop_illegal=False, solved_reward=0.5)
    # As if nothing had been proven: what is left is open, or refuted.
    open_only = structure.replace(
        proven=structure.proven & False, alive=structure.alive & ~structure.proven
    )
    keys = np.asarray(structure.answer_key)
    leaf = np.asarray(open_only.alive & ~has_child(open_only))
    ids = np.full(keys.shape, -1, np.int32)
    for row, node in zip(*np.nonzero(keys), strict=True):
        ids[row, node] = np.flatnonzero(keys[row] == keys[row, node])[0]
    answer = select_answer(open_only, jnp.asarray(ids), rule)
    refuted = np.asarray(open_only.terminal)
    choices = 0
    for row in range(len(PROMPTS)):
        if (leaf[row] & ~refuted[row] & (ids[row] >= 0)).any():
            choices += bool((leaf[row] & refuted[row]).any())
            assert not refuted[row, answer.node[row]]
    assert choices > 0


@pytest.mark.slow
def test_the_judge_is_not_asked_what_the_task_knows(model):
    structure, world, config = search(model, evaluator="p_yes")
    for oracle in oracles(model, structure, world, config):
        # Nor about the duplicates of what it was asked about.
        asked = [n for n in oracle.made if oracle.goes_on(n) and oracle.alive[n]]
        assert oracle.s.budget.scored_tokens == 4 * len(asked)
        assert len(asked) < len(oracle.made)


@pytest.mark.slow
def test_on_visit_too_the_task_decides(model):
    strategy = puct.make_puct(**TREE, judge="visit", terminal="revisit", num_simulations=30)
    structure, world, config = search(
        model,
        strategy,
        evaluator="value_head",
        judge="visit",
        max_new_tokens=4 * LIMIT,
        num_nodes=60,
    )
    visited = {"solved": 0, "refuted": 0, "open": 0}
    for row, oracle in enumerate(oracles(model, structure, world, config)):
        s = oracle.s
        for node in filter(lambda node: oracle.alive[node], oracle.made):
            if oracle.goes_on(node):
                visited["open"] += s.visits[node] > 0
                if s.visits[node] > 0:
                    known = apply_value_head(model[0].value_head, world.hidden[row, node])
                    known = -0.25 if oracle.dead_end(node) else known
                    np.testing.assert_allclose(s.model_value[node], known, atol=1e-5)
                continue
            expected = 1.0 if oracle.solved[node] else -0.25
            assert s.model_value[node] == expected
            np.testing.assert_allclose(s.value[node], expected, atol=1e-6)
            visited["solved" if oracle.solved[node] else "refuted"] += s.visits[node] > 0
    assert min(visited.values()) > 0, visited


def observe(state):
    """The sum, and behind the second step the steps, for a goal of 2."""
    steps = jnp.where(state["steps"] > 1, state["steps"], -1)
    return Observation(jnp.stack([state["sum"], steps]), jnp.int32(2))


@pytest.fixture(scope="module")
def judging(model):
    """The model with a network that judges the task's states."""
    cfg = StateValueConfig(num_goals=3, num_layers=1, model_dim=8, num_heads=1, ffn_dim=8)
    network = init_state_value(jax.random.key(5), cfg)
    return dataclasses.replace(model[0], state_value=network), *model[1:]


def test_a_network_of_its_own_judges_the_states(judging):
    """It is shown the task's state and nothing else, and what is decided it does not judge."""
    network = judging[0].state_value
    structure, world, config = search(
        judging, evaluator="state_value", task=TASK._replace(observe=observe)
    )
    states = jax.device_get(world.task_state)
    judged = 0
    for row, oracle in enumerate(oracles(judging, structure, world, config)):
        alive = [node for node in oracle.made if oracle.alive[node]]
        asked = [node for node in alive if oracle.goes_on(node)]
        steps = [int(states["steps"][row, node]) for node in asked]
        items = np.array(
            [[states["sum"][row, n], s if s > 1 else -1] for n, s in zip(asked, steps, strict=True)]
        )
        expected = apply_state_value(
            network, jnp.asarray(items, jnp.int32), jnp.full(len(items), 2, jnp.int32)
        )
        children = [[i for i in oracle.made if oracle.s.parent[i] == node] for node in asked]
        dead_end = [bool(below) and all(map(oracle.illegal.get, below)) for below in children]
        expected = np.where(dead_end, config.dead_value, expected)
        np.testing.assert_allclose(oracle.s.model_value[asked], expected, atol=1e-6)
        assert oracle.s.budget.scored_tokens == sum(2 + (step > 1) for step in steps)
        judged += len(asked)
        assert len(asked) < len(oracle.made)
    assert judged > 10


def test_states_move_with_a_kept_subtree(model):
    structure, world, config = search(model)
    inner = structure.alive & (structure.parent == 0) & ~structure.terminal & has_child(structure)
    assert inner.any(-1).all()
    nodes = jnp.argmax(inner, -1).astype(jnp.int32)

    @jax.jit
    def keep(structure, world):
        kept, order = keep_subtree(structure, nodes)
        return kept, keep_world(world, nodes, order, cfg=config), order

    kept, moved, order = keep(structure, world)
    before, after = np.asarray(world.task_state["sum"]), np.asarray(moved.task_state["sum"])
    for row in range(len(PROMPTS)):
        for new in range(int(kept.num_nodes[row])):
            assert after[row, new] == before[row, order[row, new]]


def test_steps_of_trees_do_not_begin_with_what_goes_back(model):
    """Chains may; and where a task names no such tokens nothing is barred."""
    barred = range(0, 256, 2)
    task = TASK._replace(returns=lambda tables: tables % 2 == 0)

    def first_tokens(**options):
        structure, world, config = search(model, **options)
        found = oracles(model, structure, world, config)
        return {one.step(node)[0] for one in found for node in one.made}

    assert first_tokens().intersection(barred)
    assert first_tokens(task=task, may_return=True).intersection(barred)
    assert not first_tokens(task=task).intersection(barred)
    # A chain that is not to go back hardly does.
    greedy = SamplingConfig("greedy")
    chain = {"strategy": best_of_n.make_best_of_n(1, 4), "may_return": True}
    unbiased = first_tokens(task=task, sampling=greedy, **chain)
    assert unbiased.intersection(barred)
    biased = dataclasses.replace(greedy, return_bias=-50.0)
    assert not first_tokens(task=task, sampling=biased, **chain).intersection(barred)


def outcomes(state):
    """Three sums one step on, the last of which no state has behind the second step."""
    sums = state["sum"] + jnp.arange(1, 4)
    there = (jnp.arange(3) < 2) | (state["steps"] < 2)
    open_still = there & (state["steps"] < 3)
    return Observation(jnp.where(open_still, sums, -1)[:, None], jnp.full(3, 2))


@pytest.mark.parametrize("rows_ahead", [512, 5])
def test_lookahead_is_worth_the_best_state_one_step_on(judging, monkeypatch, rows_ahead):
    monkeypatch.setattr(language_lookahead, "_ROWS_AT_ONCE", rows_ahead)
    network = judging[0].state_value

    def check(*arguments):
        """States that differ in their steps differ in what lies ahead, so they have other keys."""
        found = check_step(*arguments)
        apart = (MODULUS * found.state["steps"]).astype(jnp.uint32)
        return found._replace(key=found.key + apart)

    task = TASK._replace(step=check, observe=observe, outcomes=outcomes)
    structure, world, config = search(judging, evaluator="state_lookahead", task=task)
    states = jax.device_get(world.task_state)

    def judge(items):
        goals = jnp.full(len(items), 2, jnp.int32)
        return apply_state_value(network, jnp.asarray(items, jnp.int32), goals)

    looked = collections.Counter()
    for row, oracle in enumerate(oracles(judging, structure, world, config)):
        scored, first = 0, {}
        for node in oracle.made:
            if not (oracle.alive[node] and oracle.goes_on(node)):
                continue
            total, steps = (int(states[name][row, node]) for name in ("sum", "steps"))
            ahead = [[total + more] for more in range(1, 4 if steps < 2 else 3)]
            read = ahead if steps < 3 else [[total, steps]]
            # A state that was looked ahead from in an earlier round is not again.
            round_made = first.setdefault((total, steps), oracle.s.created_at[node])
            is_known = steps < 3 and round_made < oracle.s.created_at[node]
            looked["again"] += is_known
            scored += 0 if is_known else sum(1 + len(items) for items in read)
            looked[steps] += 1
            below = [i for i in oracle.made if oracle.s.parent[i] == node]
            dead_end = bool(below) and all(map(oracle.illegal.get, below))
            expected = config.dead_value if dead_end else float(judge(read).max())
            np.testing.assert_allclose(oracle.s.model_value[node], expected, atol=1e-6)
        assert oracle.s.budget.scored_tokens == scored
    assert min(looked[steps] for steps in (1, 2, 3)) > 3, looked
    assert looked["again"], looked


def test_chains_go_back_where_their_evaluator_sees_no_way_on(judging):
    task = TASK._replace(returns=lambda tables: tables % 2 == 0, observe=observe)
    structure, world, config = search(
        judging,
        best_of_n.make_best_of_n(3, 4),
        task=task,
        evaluator="state_value",
        may_return=True,
        sampling=SamplingConfig("sample", doubt_weight=1e4),
    )
    counts = {True: 0, False: 0}
    for oracle in oracles(judging, structure, world, config):
        for node in oracle.made:
            parent = int(oracle.s.parent[node])
            if parent:
                goes_back = oracle.step(node)[0] % 2 == 0
                assert goes_back == (oracle.s.model_value[parent] < 0.5)
                counts[goes_back] += 1
    assert min(counts.values()) > 0, counts
