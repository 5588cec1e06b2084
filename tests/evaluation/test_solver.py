"""Many problems through few rows: whose record is whose."""

import pytest

from configs.smollm2 import get_config
from rlm_jax.evaluation import build, solver
from rlm_jax.tasks.base import Gold, Problem

PROBLEMS = [Problem(f"What is {n} + {n}?", id=f"p{n}") for n in range(5)]


@pytest.fixture(scope="module")
def solve():
    config = get_config("smoke").to_dict()
    plan = build.plan_strategy(config, "puct")
    policy = build.load_policy(config["model"])
    one = build.build_solver(config, plan, policy, seed=0, batch_size=2)

    def run(problems):
        encoded = [solver.encode(one, problem) for problem in problems]
        records = solver.solve_batch(one, encoded, [Gold(p.id) for p in problems])
        return [{**record, "seconds": None} for record in records]

    return run


def test_a_long_list_keeps_its_order_and_every_record_is_as_if_alone(solve):
    together = solve(PROBLEMS)
    assert [record["id"] for record in together] == [problem.id for problem in PROBLEMS]
    for problem, record in zip(PROBLEMS[1:4:2], together[1:4:2], strict=True):
        assert record == solve([problem])[0]
