"""The reasoning-gym adapter on two of its tasks, and without the package."""

import json
import sys

import pytest

from rlm_jax.tasks import reasoning_gym
from rlm_jax.tasks.base import Gold, Problem

PROBLEM = Problem("How many?", id="p0")


@pytest.fixture
def package():
    return pytest.importorskip("reasoning_gym", reason="pip install 'rlm_jax[reasoning_gym]'")


CONFIGS = [("leg_counting", {"max_animals": 4}), ("spiral_matrix", {"max_n": 4})]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_examples_are_the_package_s_own(package, name, config):
    dataset = package.create_dataset(name, seed=5, size=4, **config)
    examples = reasoning_gym.make_examples(name, 5, 4, config)
    assert [problem.question for problem, _ in examples] == [entry["question"] for entry in dataset]
    assert len({problem.id for problem, _ in examples}) == 4
    for (problem, gold), entry in zip(examples, dataset, strict=True):
        assert problem.data == ()
        assert set(vars(problem)) == {"question", "data", "id"}
        stored = json.loads(gold.answer)
        assert reasoning_gym._unpack(stored["entry"]) == entry
        assert reasoning_gym._unpack(stored["config"]) == config


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_the_package_scores(package, name, config):
    for problem, gold in reasoning_gym.make_examples(name, 1, 5, config):
        answer = reasoning_gym._unpack(json.loads(gold.answer)["entry"])["answer"]
        for text in (f"so <answer> {answer}\n</answer>", f"<answer>1</answer> #### {answer}"):
            verdict = reasoning_gym.verify(problem, gold, text)
            assert verdict.correct is ("so" in text)
        assert reasoning_gym.verify(problem, gold, f"#### {answer}").correct
        assert not reasoning_gym.verify(problem, gold, f"<answer>{answer} 1</answer>").correct
        assert not reasoning_gym.verify(problem, gold, "").correct
        assert not reasoning_gym.verify(problem, gold, "9" * 30_000).correct


def test_a_scorer_that_fails_judges_wrong(package):
    ((problem, gold),) = reasoning_gym.make_examples("prime_factorization", 0, 1)
    verdict = reasoning_gym.verify(problem, gold, "<answer>two and three</answer>")
    assert verdict.correct is False
    assert "ValueError" in verdict.reason


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("no_such_task", {}, "no_such_task"),
        ("leg_counting", {"zork": 1}, "zork"),
        ("leg_counting", {"max_animals": -1}, "leg_counting"),
        ("leg_counting", {"seed": 1}, "config has seed"),
    ],
)
def test_wrong_names_and_configs(package, name, config, message):
    with pytest.raises(ValueError, match=message):
        reasoning_gym.make_examples(name, 0, 1, config)


def test_wrong_numbers_and_golds():
    with pytest.raises(ValueError, match="must be >= 0"):
        reasoning_gym.make_examples("leg_counting", -1, 1)
    assert reasoning_gym.verify(PROBLEM, Gold(), "4").correct is None
    for answer in ("4", "{}", "[]", '{"dataset": "x", "config": {}, "entry": {"a": 1, "b": 2}}'):
        with pytest.raises(ValueError, match="p0: the gold is no reasoning-gym entry"):
            reasoning_gym.verify(PROBLEM, Gold(answer), "#### 4")


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"rlm_jax\[reasoning_gym\]"):
        reasoning_gym.make_examples("leg_counting", 0, 1)


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.5, "a", [], (), {}, (1, (2, [3])), {"tuple": [1]}, {1: {(2, 3): "x"}}],
)
def test_json_keeps_tuples_and_keys(value):
    packed = json.loads(json.dumps(reasoning_gym._pack("x", value)))
    assert reasoning_gym._unpack(packed) == value


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"'x'.*set"):
        reasoning_gym._pack("x", [{1, 2}])


def test_prompt_ends_on_the_question():
    system, user = reasoning_gym.prompt(PROBLEM)
    assert user == {"role": "user", "content": "How many?"}
    assert "<answer>" in system["content"]
