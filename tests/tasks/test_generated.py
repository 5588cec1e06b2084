"""What every generated task owes: golds that verify, stable problems, nothing given away."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import arithmetic, knapsack, prontoqa, riddles, sat, sorting
from rlm_jax.tasks.base import Gold, Problem

TASKS = [module.TASK for module in (arithmetic, sorting, sat, knapsack, riddles, prontoqa)]
WORKED = [arithmetic, sorting, prontoqa]


@pytest.fixture(params=TASKS, ids=lambda task: task.name)
def task(request):
    return request.param


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32), difficulty=st.floats(0, 0.7))
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_golds_verify_and_are_canonical(task, seed, difficulty):
    for problem, gold in task.generate(seed, 2, difficulty):
        for text in (f"#### {gold.answer}", f"work\n#### {gold.answer}\n", f"{gold.answer}"):
            verdict = task.verify(problem, gold, text)
            assert verdict.correct is True
            assert verdict.reward == 1.0
            assert task.extract(text) == gold.answer


def test_a_self_verifying_task_needs_no_gold_and_the_others_do(task):
    for problem, gold in task.generate(3, 5, 0.4):
        verdict = task.verify(problem, Gold(), f"#### {gold.answer}")
        assert verdict.correct is (True if task.self_verifying else None)


def test_problems_do_not_hold_the_gold(task):
    """Reading an answer out of the problem, as a model might parrot it, is no way to be right."""
    right = 0
    examples = task.generate(5, 40, 0.4)
    for problem, gold in examples:
        seen = f"{problem.question} {problem.data!r} {problem.id}"
        right += task.verify(problem, gold, f"#### {problem.question}").correct
        if len(gold.answer) > 5:
            assert gold.answer not in seen
    assert right <= 30 * (gold.answer in ("True", "False"))


def test_seeds_make_problems_that_stay(task):
    assert task.generate(3, 6, 0.4)[:2] == task.generate(3, 2, 0.4)
    assert task.generate(3, 2, 0.4) != task.generate(4, 2, 0.4)
    many = task.generate(3, 30, 0.9 if task.name != "riddles" else 0.5)
    assert len({problem.id for problem, _ in many}) == 30
    assert len({problem.question for problem, _ in many}) == 30
    assert task.generate(3, 0, 0.4) == []


def test_harder_is_longer(task):
    lengths = []
    for difficulty in (0.0, 0.25, 0.5, 0.75, 1.0):
        examples = task.generate(1, 5 if task.name == "riddles" else 40, difficulty)
        lengths.append(sum(len(problem.question) for problem, _ in examples) / len(examples))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize(
    ("seed", "num_problems", "difficulty"),
    [(0, 1, -0.1), (0, 1, 1.1), (0, 1, float("nan")), (-1, 1, 0.5), (0, -1, 0.5)],
)
def test_arguments_out_of_range(task, seed, num_problems, difficulty):
    with pytest.raises(ValueError, match="must be"):
        task.generate(seed, num_problems, difficulty)


def test_prompts_show_a_right_example_and_end_on_the_question(task):
    ((problem, _),) = task.generate(0, 1, 0.3)
    system, question, solution, asked = task.prompt(problem)
    assert [m["role"] for m in (system, question, solution, asked)] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert asked["content"] == problem.question
    assert question["content"] != problem.question
    assert task.extract(solution["content"]) is not None


@pytest.mark.parametrize("text", ["", " ", "####", "\n\n", "\0", "\ud800", "#" * 1000, "9" * 9000])
def test_rubble_is_wrong_everywhere(task, text):
    for problem, gold in task.generate(0, 2, 0.2):
        assert task.verify(problem, gold, text).correct is False
        assert task.verify(problem, gold, f"#### {text}").correct is False


@settings(deadline=None, max_examples=20)
@given(text=st.text(alphabet="#x123456789=[],;: \nTrueFalsenot", max_size=60))
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_any_text_gets_a_verdict(task, text):
    ((problem, gold),) = task.generate(0, 1, 0.1)
    verdict = task.verify(problem, gold, text)
    assert verdict.correct in (True, False)
    assert verdict.level in (None, -1, 0, 1, 2)
    answer = task.extract(text)
    assert answer is None or task.extract(f"#### {answer}") == answer


@pytest.mark.parametrize("module", WORKED, ids=lambda module: module.TASK.name)
@pytest.mark.parametrize("difficulty", [0.0, 0.6, 1.0])
def test_worked_solutions_verify(module, difficulty):
    for problem, gold in module.TASK.generate(8, 20, difficulty):
        solution = module.write_solution(problem)
        assert module.TASK.verify(problem, gold, solution).correct
        assert solution.splitlines()[-1] == f"#### {gold.answer}"


@pytest.mark.parametrize("module", WORKED, ids=lambda module: module.TASK.name)
def test_no_worked_solution_without_a_problem(module):
    with pytest.raises(ValueError, match=r"no |has "):
        module.write_solution(Problem("What now?", id="p"))


def test_data_survives_json(task):
    """Data sets store a problem's data as JSON, where tuples become lists."""
    for problem, gold in task.generate(0, 3, 0.5):
        data = tuple(json.loads(json.dumps(problem.data)))
        stored = Problem(problem.question, data, problem.id)
        assert task.verify(stored, gold, f"#### {gold.answer}").correct
