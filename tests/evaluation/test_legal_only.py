"""Steps held to what is legal, in whole searches by the network that ships."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs.countdown import get_config
from rlm_jax.evaluation import build, solver
from rlm_jax.models.state_value import apply_state_value
from rlm_jax.tasks import countdown, countdown_solver
from rlm_jax.tasks.base import Gold

PUZZLES = [
    countdown.make_problem((3, 17, 58, 96), 71, "easy"),
    countdown.make_problem((44, 51, 77, 89), 13, "hard"),
]


@pytest.fixture(scope="module")
def policy():
    return build.load_policy("package:countdown")


def lines(policy, name, sampling, **settings):
    """Of every line that a search of the puzzles wrote to its end: whether it is a right move."""
    config = get_config().to_dict()
    config |= {"budget_tokens": 300, "evaluator": "likelihood"}
    config[name] |= settings
    config[name]["sampling"] |= sampling
    plan = build.plan_strategy(config, name)
    one = build.build_solver(config, plan, policy, seed=0, batch_size=len(PUZZLES))
    encoded = [solver.encode(one, puzzle) for puzzle in PUZZLES]
    golds = [Gold(puzzle.id) for puzzle in PUZZLES]
    right = []
    for solved in solver.solve_stream(one, encoded, golds):
        paths = {0: [sorted(PUZZLES[solved.place].data[0])]}
        for node in solved.record["nodes"][1:]:
            path = paths.get(node["parents"][0])
            if path and (node["text"].endswith("\n") or node["terminal"]):
                line = countdown.read_line(node["text"].removesuffix("\n"))
                after = "no line" if line is None else countdown.follow(path, line)
                right.append(not isinstance(after, str))
                if right[-1]:
                    paths[node["id"]] = after
    return np.array(right)


@pytest.mark.parametrize(
    ("name", "sampling", "settings"),
    [
        (
            "best_of_n",
            {"temperature": 3.0, "copy_returns": True},
            {"num_chains": 4, "max_depth": 6},
        ),
        (
            "best_first",
            {"method": "beam", "min_ratio": 0.0},
            {"num_nodes": 49, "num_children": 12, "merge_states": False},
        ),
    ],
)
def test_every_line_is_a_right_move(policy, name, sampling, settings):
    """At a temperature at which most lines do not follow, and where beams reach far down."""
    right = {
        legal_only: lines(policy, name, sampling | {"legal_only": legal_only}, **settings)
        for legal_only in (False, True)
    }
    assert (~right[False]).sum() > 3
    assert right[True].all()
    assert len(right[True]) > 10


def test_steps_are_weighed_by_what_the_network_says_of_their_outcomes(policy):
    """Where that weighs more than the policy, a chain's steps are the network's favourites."""
    config = get_config().to_dict()
    config["greedy_controlled"]["max_depth"] = 2
    config["greedy_controlled"]["sampling"] |= {"outcome_weight": 1e4, "doubt_weight": 0.0}
    plan = build.plan_strategy(config, "greedy_controlled")
    one = build.build_solver(config, plan, policy, seed=0, batch_size=len(PUZZLES))
    encoded = [solver.encode(one, puzzle) for puzzle in PUZZLES]
    golds = [Gold(puzzle.id) for puzzle in PUZZLES]
    for solved in solver.solve_stream(one, encoded, golds):
        numbers, target = PUZZLES[solved.place].data
        scored = 0
        for node in solved.record["nodes"][1:]:
            listed = countdown_solver.list_moves(np.sort(numbers)[None])
            outcomes = listed.states[0][listed.legal[0]].astype(np.int32)
            goals = jnp.full(len(outcomes), target, jnp.int32)
            values = apply_state_value(policy.state_value, jnp.asarray(outcomes), goals)
            # What is said to be lost is all alike.
            values = np.maximum(values, 1e-3)
            line = countdown.read_line(node["text"].removesuffix("\n"))
            (*_, numbers) = countdown.follow([sorted(numbers)], line)
            of_line = values[(np.sort(outcomes) == np.sort(numbers)).all(1)]
            assert of_line.max() == pytest.approx(values.max(), rel=1e-4)
            scored += len(numbers)
        assert len(numbers) == 2
        assert solved.record["budget"]["scored_tokens"] > scored


def test_another_vocabulary_is_named():
    config = get_config().to_dict()
    config["evaluator"] = "likelihood"
    config["greedy"]["sampling"]["legal_only"] = True
    plan = build.plan_strategy(config, "greedy")
    policy = build.load_policy("random:tiny-llama")
    with pytest.raises(ValueError, match="legal_only=True: accepted is False with random:tiny"):
        build.build_solver(config, plan, policy, seed=0, batch_size=1)
