"""From settings to a solver: what reaches the search, and which settings are refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from configs.smollm2 import get_config
from rlm_jax.evaluation import build, solver
from rlm_jax.tasks import arithmetic
from rlm_jax.tasks.base import Gold, Problem
from rlm_jax.tasks.device import DeviceTask, StepCheck


def check_step(tables, state, tokens, length, ends):
    """Steps follow while they begin with a byte below 128; what ends solves."""
    first = tables[tokens[0]] & (length > 0)
    return StepCheck(state + 1, first, ends, (state + 2).astype(jnp.uint32))


CHECKER = DeviceTask(
    make_tables=lambda pieces: jnp.asarray([piece[:1] < b"\x80" for piece in pieces]),
    begin=lambda tables, prompt, length: length * 0,
    step=check_step,
)


@pytest.fixture(scope="module")
def policy():
    return build.load_policy("random:tiny-llama")


def make_config(**changes):
    return {**get_config("smoke").to_dict(), **changes}


def make_solver(policy, **changes):
    config = make_config(**changes)
    plan = build.plan_strategy(config, "best_first")
    return build.build_solver(config, plan, policy, seed=0, batch_size=2)


@pytest.fixture
def checked_task(monkeypatch):
    def offer(**changes):
        task = dataclasses.replace(arithmetic.TASK, self_verifying=True, device=CHECKER)
        monkeypatch.setitem(build.TASKS, "checked", dataclasses.replace(task, **changes))

    return offer


def test_a_self_verifying_task_checks_the_steps_of_a_search(policy, checked_task):
    checked_task()
    one = make_solver(policy, task="checked")
    assert one.lm.task_tables.shape == (policy.cfg.vocab_size,)
    encoded = [solver.encode(one, Problem("1 + 1", id=name)) for name in "ab"]
    structure, world = solver.search_batch(one, encoded)
    s = [np.asarray(a) for a in (structure.span_length, structure.alive, world.tokens)]
    illegal = 0
    for row in range(2):
        made = [i for i in range(1, int(structure.num_nodes[row])) if s[0][row, i]]
        assert structure.budget.verifier_calls[row] == len(made)
        for node in made:
            if s[2][row, node, 0] >= 128 and s[2][row, node, 0] < 256:
                assert not s[1][row, node]
                illegal += 1
    assert illegal > 3
    assert one.settings["use_verifier"] is True
    records = solver.solve_batch(one, encoded, [Gold("2")] * 2)
    assert [record["budget"]["verifier_calls"] for record in records] == np.asarray(
        structure.budget.verifier_calls
    ).tolist()


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"use_verifier": False}, {}),
        ({}, {"self_verifying": False}),
        ({}, {"device": None}),
    ],
)
def test_no_checks_where_they_are_not_wanted_or_not_fair(policy, checked_task, settings, changes):
    checked_task(**changes)
    one = make_solver(policy, task="checked", **settings)
    assert one.language.task is None
    assert one.lm.task_tables is None


def test_use_verifier_is_yes_or_no():
    with pytest.raises(ValueError, match="use_verifier 'maybe': accepted are true, false"):
        build.plan_strategy(make_config(use_verifier="maybe"), "puct")
    config = make_config()
    del config["use_verifier"]
    with pytest.raises(ValueError, match="the config lacks use_verifier"):
        build.plan_strategy(config, "puct")
