"""Chains that go on behind lines that do not follow, by the network that ships."""

from configs.countdown import get_config
from rlm_jax.evaluation import build, solver
from rlm_jax.evaluation.chains import read_chains
from rlm_jax.tasks import countdown
from rlm_jax.tasks.base import Gold

PUZZLES = [
    countdown.make_problem((7, 37, 79, 86), 51, "a"),
    countdown.make_problem((7, 60, 74, 77), 56, "b"),
    countdown.make_problem((8, 33, 65, 85), 61, "c"),
    countdown.make_problem((9, 33, 96, 99), 52, "d"),
]


def test_a_chain_that_erred_is_right_where_it_went_back():
    """And says so with an answer that is exact, though not all of its lines are."""
    config = get_config().to_dict() | {"evaluator": "likelihood"}
    config["greedy_no_repeats"] |= {"may_err": True, "max_depth": 24}
    plan = build.plan_strategy(config, "greedy_no_repeats")
    assert plan.settings["may_err"]
    policy = build.load_policy("package:countdown")
    one = build.build_solver(config, plan, policy, seed=0, batch_size=len(PUZZLES))
    encoded = [solver.encode(one, puzzle) for puzzle in PUZZLES]
    mended = 0
    for solved in solver.solve_stream(one, encoded, [Gold()] * len(PUZZLES)):
        problem, record = PUZZLES[solved.place], solved.record
        assert record["correct"] == (record["answer"] is not None)
        if record["correct"]:
            assert countdown.judge_expression(*problem.data, record["answer"]).correct
            text = read_chains(record)[0].text
            mended += not countdown.verify(problem, Gold(), text).correct
    assert mended
