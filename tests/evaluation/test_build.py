"""From settings to a solver: what reaches the search, and which settings are refused."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from configs.countdown import get_config as puzzle_config
from configs.smollm2 import get_config
from rlm_jax.evaluation import build, solver
from rlm_jax.reasoning.strategies import best_of_n, greedy
from rlm_jax.reasoning.tree_config import TreeConfig
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


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("puct", {"sampling.return_bias": -1.0}, "puct.sampling.return_bias=-1.0: .* a tree goes"),
        ("greedy", {"sampling.return_bias": -1.0}, "task 'free' has no steps that go back"),
        ("greedy", {"sampling.return_bias": float("nan")}, "return_bias=nan: accepted is finite"),
        (
            "greedy",
            {"sampling.return_bias": -1.0, "task": "countdown", "use_verifier": False},
            "without use_verifier nothing says",
        ),
        (
            "greedy",
            {"sampling.copy_returns": True},
            "greedy.sampling.copy_returns=True: accepted is False, as task 'free' has no steps",
        ),
        ("greedy", {"sampling.doubt_weight": 1.0}, "doubt_weight=1.0: .* no steps that go back"),
        ("greedy", {"sampling.doubt_weight": -1.0}, "doubt_weight=-1.0: accepted is a number >= 0"),
        (
            "greedy",
            {"sampling.doubt_weight": 1.0, "task": "countdown", "evaluator": "none"},
            "doubt_weight=1.0: accepted is 0, as evaluator 'none' doubts nothing",
        ),
        ("puct", {"evaluator": "state_value"}, "'state_value': task 'free' does not say what its"),
        ("puct", {"evaluator": "state_lookahead"}, "task 'free' does not say what its states"),
        (
            "puct",
            {"evaluator": "state_value=1,likelihood=1", "task": "game24", "use_verifier": False},
            "without use_verifier nothing says what the states are",
        ),
        (
            "puct",
            {"sampling.legal_only": True},
            "puct.sampling.legal_only=True: accepted is False, as task 'free' does not list",
        ),
        (
            "greedy",
            {"sampling.legal_only": True, "task": "countdown", "use_verifier": False},
            "legal_only=True: .* without use_verifier nothing says which steps are legal",
        ),
        (
            "puct",
            {"sampling.method": "greedy", "resample": False},
            "puct.num_children=2: accepted is 1 with sampling.method='greedy'",
        ),
        (
            "puct",
            {"sampling.method": "beam"},
            "puct.resample=True: accepted is False with sampling.method='beam', which writes the",
        ),
        (
            "gumbel",
            {"sampling.method": "diverse_beam", "resample": False, "root_lanes": 2},
            "gumbel.root_lanes=2: accepted is 1 with sampling.method='diverse_beam'",
        ),
        (
            "best_of_n",
            {"sampling.method": "greedy"},
            "best_of_n.num_chains=2: accepted is 1 with sampling.method='greedy'",
        ),
        (
            "best_first_widening",
            {"sampling.method": "sample", "num_children": 2},
            "best_first_widening.num_children=2: accepted is 1 with widen=True and",
        ),
        (
            "puct",
            {"merge_states": True},
            "puct.merge_states=True: accepted is False, as task 'free' does not say what its",
        ),
        (
            "puct",
            {"merge_states": True, "task": "arithmetic"},
            "puct.merge_states=True: accepted is False, as task 'arithmetic' does not say what",
        ),
        (
            "puct",
            {"aggregate": "min"},
            "aggregate 'min' of evaluator 'confidence': accepted is last, as it judges no steps",
        ),
        (
            "greedy",
            {"sampling.outcome_weight": 1.0},
            "outcome_weight=1.0: accepted is a number >= 0, and 0 without legal_only",
        ),
        ("greedy_legal", {"use_verifier": False}, "max_refused=8: accepted is 0 without"),
        (
            "greedy",
            {"may_err": True},
            "greedy.may_err=True: accepted is False, as task 'free' does not say what a wrong step",
        ),
        (
            "greedy",
            {"may_err": True, "task": "countdown", "use_verifier": False},
            "greedy.may_err=True: accepted is False, as without use_verifier nothing says what",
        ),
        (
            "puct",
            {"may_err": True, "task": "countdown"},
            "puct.may_err=True: accepted is False, as a tree goes on from steps that follow alone",
        ),
        (
            "greedy",
            {"may_err": 1, "task": "countdown"},
            "greedy.may_err=1: accepted is true, false, as it is a flag",
        ),
        ("greedy_legal", {"drop_illegal": False}, "max_refused=8: accepted is 0 without"),
        (
            "best_first_widening",
            {"sampling.no_repeats": False, "resample": False},
            "best_first_widening.widen=True: accepted is sampling.no_repeats=True",
        ),
    ],
)
def test_settings_that_need_others_say_so(name, changes, message):
    config = make_config()
    for key, value in changes.items():
        if "." in key:
            config[name]["sampling"][key.removeprefix("sampling.")] = value
        else:
            (config if key in config else config[name])[key] = value
    with pytest.raises(ValueError, match=message):
        build.plan_strategy(config, name)


def test_a_model_without_a_network_for_states_is_named(policy):
    with pytest.raises(ValueError, match="random:tiny-llama comes without a network for states"):
        make_solver(policy, task="game24", evaluator="state_value=1,likelihood=1")
    held = make_config()["best_first"]
    held["sampling"] |= {"legal_only": True, "outcome_weight": 0.5}
    with pytest.raises(ValueError, match=r"outcome_weight=0\.5: random:tiny-llama comes without a"):
        make_solver(policy, task="game24", best_first=held)


MAKERS = {
    "greedy": greedy.make_greedy,
    "greedy_no_repeats": greedy.make_greedy,
    "greedy_guided": greedy.make_greedy,
    "greedy_controlled": greedy.make_greedy,
    "greedy_legal": greedy.make_greedy,
    "best_of_n": best_of_n.make_best_of_n,
    **build.TREE_SEARCHES,
}


def keywords(name):
    """Every keyword of a strategy's builder, those of `TreeConfig` among them."""
    parameters = inspect.signature(MAKERS[name]).parameters.values()
    found = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        found |= {field.name for field in dataclasses.fields(TreeConfig)}
    return found


def test_a_strategy_may_have_an_evaluator_of_its_own():
    config = make_config(evaluator="confidence")
    config["puct"]["evaluator"] = "likelihood"
    assert build.plan_strategy(config, "puct").settings["evaluator"] == "likelihood"
    assert build.plan_strategy(config, "uct").language.evaluator == "confidence"
    config["puct"]["evaluator"] = "luck"
    with pytest.raises(ValueError, match="'luck': accepted are confidence"):
        build.plan_strategy(config, "puct")


@pytest.mark.parametrize("name", build.STRATEGIES)
def test_every_option_of_a_strategy_stands_in_the_config(name):
    """Flags can only change what is there; the depth is the whole run's."""
    listed = set(get_config()[name]) | {"max_depth"}
    assert listed - {"sampling", "num_nodes"} == keywords(name)


OTHER_VALUES = {
    "judge": "visit", "backup": "max", "terminal": "stop", "tie_break": "random",
    "answer_rule": "majority", "q": "siblings", "dropped": "keep", "rule": "best",
    "num_solutions": 3, "num_simulations": 5, "base": 19652.0, "threshold": 0.25,
    "unvisited": 1.0, "value_low": -1.0, "num_nodes": 18,
}  # fmt: skip


def other_value(option, old):
    """Another value that the option accepts."""
    if option in OTHER_VALUES:
        return OTHER_VALUES[option]
    if old is None:
        return 1
    if isinstance(old, int) and not isinstance(old, bool):
        return old + 1
    return not old if isinstance(old, bool) else old / 2 or 0.25


@pytest.mark.parametrize("name", build.STRATEGIES)
def test_every_option_of_a_strategy_can_be_changed(name):
    """Each to another value, one at a time, as a flag would; it reaches the plan's settings."""
    usual = get_config("smoke").to_dict()
    for option, old in usual[name].items():
        if option == "sampling":
            continue
        config, new = get_config("smoke"), other_value(option, old)
        if option == "root_lanes" and name != "beam":
            config[name].num_lanes = 4
        if option == "num_children":
            config[name].sampling.method = "sample"
            if usual[name].get("widen"):
                config[name].widen = False
        if option == "widen" and new:
            config[name].update({"prior_weight": 0.5, "num_children": 1})
            config[name].sampling.no_repeats = True
        if option == "merge_states":
            config.task = "countdown"
        config[name][option] = new
        changed = config.to_dict()
        plan = build.plan_strategy(changed, name)
        assert plan.settings[option] == new != old
        assert plan.strategy.name == name
        assert {one for one in usual if changed[one] != usual[one]} <= {name, "task"}


def test_beams_that_would_write_the_same_steps_leave_the_root_to_one():
    config = puzzle_config().to_dict()
    for method, lanes in (("beam", 1), ("stochastic_beam", None)):
        config["beam"]["sampling"]["method"] = method
        plan = build.plan_strategy(config, "beam")
        assert plan.settings.get("root_lanes") == lanes


def test_a_root_is_sampled_anew_where_that_may_bring_other_steps():
    config = puzzle_config().to_dict()
    for method, settings in (("beam", False), ("stochastic_beam", True)):
        config["best_first"]["sampling"] |= {"method": method, "min_ratio": 0.0}
        plan = build.plan_strategy(config, "best_first")
        assert plan.settings.get("resample", True) is settings


def test_an_unknown_option_is_refused_by_name():
    config = make_config()
    config["puct"]["explorations"] = 3
    with pytest.raises(ValueError, match="explorations"):
        build.plan_strategy(config, "puct")


def test_judging_reaches_the_search(policy):
    evaluator = {"confidence": 1, "rollout": 2}
    changes = {"num_rollouts": 3, "rollout_tokens": 5, "rollout_discount": 0.5}
    one = make_solver(policy, evaluator=evaluator, mixture="geometric", **changes)
    assert one.language.evaluator == one.settings["evaluator"] == "confidence=1,rollout=2"
    assert one.language.mixture == "geometric"
    for name, value in changes.items():
        assert getattr(one.language, name) == one.settings[name] == value
    assert one.language.model == policy.cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluator": "me"}, "'me': accepted are confidence"),
        ({"evaluator": {"rollout": -1}}, "rollout=-1: accepted is a number >= 0"),
        ({"aggregate": "median"}, "median"),
        ({"mixture": "median"}, "median"),
        ({"num_rollouts": 0}, "num_rollouts must be >= 1, got 0"),
        ({"rollout_discount": 2.0}, "rollout_discount must be in"),
        ({"drop_illegal": 1}, "drop_illegal 1: accepted are true, false"),
    ],
)
def test_bad_judging_is_refused_before_a_model_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        build.plan_strategy(make_config(**changes), "puct")
