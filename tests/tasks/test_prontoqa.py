"""PrOntoQA: an oracle that closes sets of facts, the hops of the dial, what does not follow."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import prontoqa
from rlm_jax.tasks.base import Gold, Problem
from rlm_jax.tasks.prontoqa import Query, Rule


def read_answer(question):
    """The answer off the words alone: closes the set of facts about the one who is asked about."""
    rules = re.findall(r"Every (\w+) is (not )?(?:a )?(\w+)\.", question)
    name, kind = re.search(r"\. (\w+) is a (\w+)\. True or false", question).groups()
    negated, what = re.search(rf"True or false: {name} is (not )?(\w+)\.$", question).groups()
    facts = {kind: True}
    for _ in rules:
        for subject, no, thing in rules:
            if facts.get(subject):
                assert facts.setdefault(thing, not no) == (not no), "contradiction"
    return None if what not in facts else facts[what] == (not negated)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_gold_is_what_the_words_say(seed, difficulty):
    for problem, gold in prontoqa.generate(seed, 3, difficulty):
        assert gold.answer == str(read_answer(problem.question))


@pytest.mark.parametrize(("difficulty", "hops"), [(0.0, 2), (0.5, 4), (0.79, 5), (1.0, 7)])
def test_hops_follow_the_dial(difficulty, hops):
    examples = prontoqa.generate(1, 100, difficulty)
    for problem, _ in examples:
        query, *rules = problem.data
        holds, chain = prontoqa.solve(tuple(rules), query)
        assert holds is not None
        assert len(chain) == hops
        assert len(rules) == 2 * hops
        assert any(rule.what == query.what and rule not in chain for rule in rules)
        solution = prontoqa.write_solution(problem)
        assert len(solution.splitlines()) == hops + 1
    share = sum(gold.answer == "True" for _, gold in examples) / len(examples)
    assert 0.35 < share < 0.65


def test_what_does_not_follow():
    rules = (Rule("a", "b", True), Rule("b", "a", True), Rule("c", "cold", False))
    assert prontoqa.solve(rules, Query("Sam", "a", "cold", True)) == (None, [])
    problem = prontoqa.make_problem(rules, Query("Sam", "a", "cold", True), "p")
    with pytest.raises(ValueError, match=r"p: nothing follows about cold"):
        prontoqa.write_solution(problem)


def test_a_known_answer():
    rules = (Rule("b", "cold", False, positive=False), Rule("a", "b", True))
    query = Query("Sam", "a", "cold", True)
    problem = prontoqa.make_problem(rules, query)
    assert problem.question == (
        "Every b is not cold. Every a is a b. Sam is a a. True or false: Sam is cold."
    )
    assert prontoqa.solve(rules, query) == (False, [rules[1], rules[0]])
    assert prontoqa.write_solution(problem) == (
        "Sam is a a. Every a is a b, so Sam is a b.\n"
        "Every b is not cold, so Sam is not cold.\n"
        "#### False"
    )


def test_levels():
    verify = prontoqa.TASK.verify
    problem = Problem("?")
    assert verify(problem, Gold("False"), "so Sam is not cold.\n#### False").level == 2
    assert verify(problem, Gold("False"), "#### True").level == 0
    assert verify(problem, Gold("False"), "so Sam is not cold.").level == -1


def test_the_example_is_right():
    _, question, solution, _ = prontoqa.prompt(Problem("?"))
    answer = read_answer(question["content"])
    assert prontoqa.TASK.extract(solution["content"]) == str(answer)
