"""Sorting on token ids against the Python verifier: thousands of hostile texts, cut anyhow."""

import random

import pytest
from device_strings import (
    NUM_ROWS,
    byte_pieces,
    compile_checker,
    mix,
    multi_byte_pieces,
    trace_sharded,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import sorting
from rlm_jax.tasks.base import Gold, Problem

# Ten thousand hostile texts, over two vocabularies.
pytestmark = pytest.mark.slow

GLUE = [
    "", " ", "\n", "\r\n", "####", "#### ", "###", "########", "[", "]", "[[", "]]", ", ", ",", ".",
    "0", "9", "10", "-1", "\N{ARABIC-INDIC DIGIT NINE}", "\N{MINUS SIGN}", "**", "`", "sorted: ",
    "x",
    "0.5", "1.", "..", "Sort [1]", "\N{NO-BREAK SPACE}", "\0", "\ud800", "\\boxed{", "}", "(", ")",
]  # fmt: skip


ALPHABET = "1233.,[]# \n:*-x\N{ARABIC-INDIC DIGIT ONE}"


@pytest.fixture(scope="module", params=[byte_pieces, multi_byte_pieces])
def checker(request):
    return compile_checker(sorting.TASK.device, request.param)


def make_prompt(rng, digits):
    question = sorting.make_problem(digits).question
    if rng.random() < 0.2:
        i = rng.randrange(6, len(question) - 20)
        question = question[:i] + rng.choice("[]0, xS-") + question[i + rng.randrange(2) :]
    before = rng.choice(
        ["", "Sort [2, 1] in ascending order.\n#### [1, 2]\n", "Sort [1, Sort [", "SSort "]
    )
    return before + question + rng.choice(["", "\n", "<|im_end|>\nassistant: "])


def make_text(rng, digits):
    """Right answers, nearly right ones and rubble."""
    want = sorted(digits)
    swapped = [*want[1:], want[0]]
    lists = [want, want, want, want[:-1], [*want, want[-1]], want[::-1], swapped, digits]
    shown = sorting.format_list(rng.choice(lists))
    shown = rng.choice(
        [
            shown,
            shown,
            shown,
            shown[1:-1],
            shown[:-1],
            shown.replace(", ", ","),
            shown.replace(",", ""),
        ]
    )
    before = rng.choice(["", "[1, 2]\n", "".join(rng.choices(GLUE, k=3))])
    mark = rng.choice(["#### ", "#### ", "#### ", "\n", "####\n\n", "Sorted: "])
    after = rng.choice(["", "", "\n", "\ndone [3]", " done", "".join(rng.choices(GLUE, k=2))])
    return before + mark + shown + after


@pytest.mark.parametrize("seed", range(5))
def test_solved_equals_the_python_verifier(checker, seed):
    rng = random.Random(seed)
    lists = [rng.choices(range(10), k=rng.choice([1, 2, 3, 8, 32])) for _ in range(NUM_ROWS)]
    prompts = [make_prompt(rng, digits) for digits in lists]
    texts = [make_text(rng, digits) for digits in lists]
    expected = [
        sorting.verify(Problem(prompt), Gold(), text).correct is True
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert 0.1 < sum(expected) / NUM_ROWS < 0.9
    found = checker.is_solved(prompts, texts, rng)
    wrong = [i for i in range(NUM_ROWS) if found[i] != expected[i]]
    assert not wrong, [(prompts[i], texts[i], expected[i]) for i in wrong[:3]]


def test_the_prompt_s_counts_are_the_python_ones(checker):
    rng = random.Random(3)
    lists = [rng.choices(range(10), k=rng.randrange(1, 65)) for _ in range(NUM_ROWS - 4)]
    prompts = [make_prompt(rng, digits) for digits in lists]
    prompts += ["Sort []", "Sort [10]", "Sort [1, 2", "Sort [1]Sort [ 3 ,3]"]
    state = checker.begin(prompts, rng)
    for prompt, known, counts in zip(
        prompts, state.known.tolist(), state.given.tolist(), strict=True
    ):
        digits = sorting.read_digits(prompt)
        assert known == (digits is not None), prompt
        if digits is not None:
            assert counts == [digits.count(digit) for digit in range(10)], prompt
    assert state.known.tolist()[-4:] == [False, False, False, True]


@pytest.fixture(scope="module")
def byte_checker():
    return compile_checker(sorting.TASK.device, byte_pieces)


@settings(max_examples=3, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=40), min_size=1, max_size=50), st.integers(0, 2**32))
def test_any_text_is_judged_alike(byte_checker, texts, seed):
    rng = random.Random(seed)
    texts = mix(["#### [1, 2]", *texts], rng)
    problem = sorting.make_problem([2, 1])
    expected = [sorting.verify(problem, Gold(), text).correct for text in texts]
    assert byte_checker.is_solved([problem.question] * NUM_ROWS, texts, rng) == expected


def test_published_sizes_are_solved_by_their_worked_solutions(byte_checker):
    rng = random.Random(4)
    examples = [*sorting.generate(0, 500, 0.6), *sorting.generate(0, 500, 0.5)]
    state = byte_checker.begin([problem.question for problem, _ in examples], rng)
    parts = [sorting.write_solution(problem)[-200:].encode() for problem, _ in examples]
    check = byte_checker.step(state, parts, rng)
    assert check.solved.all()
    assert check.legal.all()
    assert not byte_checker.step(state, parts, rng, ends=False).solved.any()


def test_runs_under_shard_map():
    check = trace_sharded(sorting.TASK.device, byte_pieces())
    assert check.solved.shape == check.legal.shape == check.key.shape == (4,)
