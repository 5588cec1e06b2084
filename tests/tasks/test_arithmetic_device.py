"""Arithmetic on token ids against the Python verifier: thousands of hostile texts, cut anyhow."""

import functools
import itertools
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

from rlm_jax.tasks import arithmetic
from rlm_jax.tasks.arithmetic import MAX_VALUE
from rlm_jax.tasks.base import Gold, Problem

GLUE = [
    "", " ", "\n", "\r\n", "\t", "####", "#### ", "\n#### ", "###", "#", "########", "=", " = ",
    "**", "*", ":", ".", ",", "-", " - ", "+", "\N{MINUS SIGN}", "$", "(", ")", "/", "^", "%", "e",
    "x", "so ", " apples", "\\boxed{", "}", "answer is ", "Step 1", "_",
    "\N{NO-BREAK SPACE}", "\v",
    "\f", "\0", "\x1c", "\N{LINE SEPARATOR}", "\N{FULL BLOCK}", "\ud800", "\N{EM DASH}", "`",
    "Compute 1.",
]  # fmt: skip
ODD_NUMBERS = [
    "0", "00", "-0", "007", "1,000", "1,00", "1000,000", "12,345,678", "1.5", "9.", "9.0", "9.00",
    "9.000001", "1.5.2", ".5", "12:30", "1e3", "3/4", "10-3", "2147483648", "4294967305",
    "100000000",
    "100000001", "-100000000", "9" * 60, "0" * 60 + "9", "9." + "0" * 60,
    "\N{ARABIC-INDIC DIGIT NINE}",
    "\N{FULLWIDTH DIGIT NINE}", "x9", "9x", "9\N{COMBINING ENCLOSING KEYCAP}", "--9", "+9", "-+9",
]  # fmt: skip


ALPHABET = "0123456789-+=#.,:*/ \n$x\N{MINUS SIGN}\N{ARABIC-INDIC DIGIT THREE}"


@pytest.fixture(scope="module", autouse=True)
def values_remembered():
    """Works an expression out once: shape checks wrap its inner functions anew at every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "work_out", functools.cache(arithmetic.work_out))
        yield


@pytest.fixture(scope="module", params=[byte_pieces, multi_byte_pieces])
def checker(request):
    return compile_checker(arithmetic.TASK.device, request.param)


@pytest.fixture(scope="module")
def byte_checker():
    return compile_checker(arithmetic.TASK.device, byte_pieces)


def make_prompt(rng):
    """A chat with a worked example before the statement; sometimes a statement that is none."""
    problem, _ = arithmetic.generate(rng.randrange(10**6), 1, rng.random())[0]
    question = problem.question
    if rng.random() < 0.2:
        i = rng.randrange(8, len(question))
        question = question[:i] + rng.choice("()+-*/ .9xC") + question[i + rng.randrange(2) :]
    before = rng.choice(
        ["", "Compute 1 + 1.\n#### 2\n", "Compute Compute ", "Compute .", "CCompute 2"]
    )
    return before + question + rng.choice(["", "\n", "<|im_end|>\nassistant: "])


def make_text(rng, value):
    """Right answers, nearly right ones and rubble."""
    near = [str(value), str(value), f"{value:,}", f"{value}.0", f"0{value}", str(-value)]
    near += [str(value + 1), str(value * 10), str(value)[:-1], f"{value + 2**32}"]
    parts = []
    for _ in range(rng.randrange(1, 7)):
        kind = rng.random()
        parts.append(rng.choice(GLUE if kind < 0.6 else near if kind < 0.85 else ODD_NUMBERS))
    text = "".join(parts)
    if rng.random() < 0.3:
        text = f"3 + 4 = 7\n{text}#### {rng.choice(near)}{rng.choice(GLUE)}"
    return text[:250]


def find_value(prompt):
    try:
        return int(arithmetic.write_solution(Problem(prompt)).rsplit("#### ", 1)[1])
    except ValueError:
        return None


@pytest.mark.parametrize("seed", range(5))
def test_solved_equals_the_python_verifier(checker, seed):
    rng = random.Random(seed)
    prompts = [make_prompt(rng) for _ in range(NUM_ROWS // 4)] * 4
    values = [find_value(prompt) for prompt in prompts]
    texts = [make_text(rng, 7 if value is None else value) for value in values]
    expected = [
        arithmetic.verify(Problem(prompt), Gold(), text).correct is True
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert 0.05 < sum(expected) / NUM_ROWS < 0.9
    assert 0.05 < values.count(None) / NUM_ROWS < 0.5
    found = checker.is_solved(prompts, texts, rng)
    wrong = [i for i in range(NUM_ROWS) if found[i] != expected[i]]
    assert not wrong, [(prompts[i], texts[i], expected[i]) for i in wrong[:3]]


def test_the_prompt_s_value_is_the_python_one(checker):
    rng = random.Random(7)
    prompts = [make_prompt(rng) for _ in range(NUM_ROWS - 12)]
    for inside in (
        "99999999 + 1", "100000000 + 1", "100000000 * 100000000", "50000 * 2000", "50000 * 2001",
        "7 / 2", "7 / 0", "0 / 7", "((((((((1))))))))", "(((((((((1)))))))))", " 3 4 ",
        "2 * (3 - 9) / 4",
    ):  # fmt: skip
        prompts.append(f"Compute {inside}.")
    state = checker.begin(prompts, rng)
    expected = [find_value(prompt) for prompt in prompts]
    known, values = state.known.tolist(), state.value.tolist()
    found = [value if is_known else None for value, is_known in zip(values, known, strict=True)]
    assert found == expected
    assert expected[-12:] == [10**8, None, None, 10**8, None, None, None, 0, 1, None, None, -3]


@pytest.mark.parametrize(
    ("value", "fragments", "length"),
    [(7, ["7", ",", ".", "-", "+", "*", "x", " ", "=", "\N{MINUS SIGN}"], 4),
     (1007, ["1,007", "1", "007", "07", ",", ".", "*", "x", " ", "0"], 3)],
)  # fmt: skip
def test_every_short_answer(byte_checker, value, fragments, length):
    rng, problem = random.Random(0), Problem(f"Compute {value} + 0.")
    state = byte_checker.begin([problem.question] * NUM_ROWS, rng)
    texts = ["#### " + "".join(parts) for parts in itertools.product(fragments, repeat=length)]
    assert len(texts) % NUM_ROWS == 0
    for start in range(0, len(texts), NUM_ROWS):
        batch = texts[start : start + NUM_ROWS]
        found = byte_checker.step(state, [text.encode() for text in batch], rng).solved.tolist()
        expected = [arithmetic.verify(problem, Gold(), text).correct for text in batch]
        assert found == expected


def make_step(rng):
    """Calculations, true and false ones, and what is nearly one."""
    a, b = (rng.choice([0, 1, -1, 7, -12, 360, 46341, MAX_VALUE, MAX_VALUE + 1]) for _ in range(2))
    sign = rng.choice("+-*/")
    true = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]
    c = true + rng.choice([0, 0, 0, 1, -1, 2**32])
    space = rng.choice([" ", " ", " ", "", "  "])
    text = f"{a}{space}{sign}{space}{b}{space}={space}{c}"
    end = rng.choice(["\n", "\n", "", " ", ".", "\r\n", "\n\n", "\n1 + 1 = 3\n", " apples", "0"])
    return rng.choice(["", "", "", "\n", "So ", "-", "#### ", "0"]) + text + end


def test_only_false_calculations_are_illegal(checker):
    rng = random.Random(1)
    texts = [make_step(rng) for _ in range(NUM_ROWS)]
    state = checker.begin(["Compute 1 + 1."] * NUM_ROWS, rng)
    legal = checker.step(state, [text.encode() for text in texts], rng).legal.tolist()
    expected = [not arithmetic.is_false_calculation(text) for text in texts]
    assert 0.1 < expected.count(False) / NUM_ROWS < 0.9
    wrong = [i for i in range(NUM_ROWS) if legal[i] != expected[i]]
    assert not wrong, [(texts[i], expected[i]) for i in wrong[:3]]


@settings(max_examples=3, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=60), min_size=1, max_size=50), st.integers(0, 2**32))
def test_any_text_is_judged_alike(byte_checker, texts, seed):
    rng = random.Random(seed)
    texts = mix(["#### 9", *texts], rng)
    problem = Problem("Compute 3 * 3.")
    expected = [arithmetic.verify(problem, Gold(), text).correct for text in texts]
    assert byte_checker.is_solved([problem.question] * NUM_ROWS, texts, rng) == expected


def test_worked_solutions_are_legal_and_solved(checker):
    rng = random.Random(2)
    examples = arithmetic.generate(5, NUM_ROWS, 0.4)
    solutions = [arithmetic.write_solution(problem) for problem, _ in examples]
    state = checker.begin([problem.question for problem, _ in examples], rng)
    steps = [solution.split("\n") for solution in solutions]
    for i in range(max(map(len, steps))):
        parts = [(lines[i] + "\n").encode() if i < len(lines) else b"" for lines in steps]
        check = checker.step(state, parts, rng, ends=i + 1 == max(map(len, steps)))
        assert check.legal.all()
        state = check.state
    assert check.solved.all()


def test_runs_under_shard_map():
    check = trace_sharded(arithmetic.TASK.device, byte_pieces())
    assert check.solved.shape == check.legal.shape == check.key.shape == (4,)
