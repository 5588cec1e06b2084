"""Game of 24: the parser against Python's own, the verifier against hostile text, the solver."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.tasks import game24
from rlm_jax.tasks.base import Gold

PROBLEM = game24.make_problem((3, 5, 6, 8), "p")

leaves = st.integers(0, 13).map(lambda n: (str(n), Fraction(n)))


def _join(parts):
    (x, a), operator, (y, b) = parts
    if a is None or b is None or (operator == "/" and b == 0):
        return f"({x}{operator}{y})", None
    values = {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}
    return f"({x}{operator}{y})", values[operator]


trees = st.recursive(
    leaves, lambda sub: st.tuples(sub, st.sampled_from("+-*/"), sub).map(_join), max_leaves=8
)


@given(trees)
def test_parser_gives_the_tree_s_value(tree):
    text, value = tree
    if value is None:
        with pytest.raises(ValueError, match="division by zero"):
            game24.parse(text)
    else:
        assert game24.parse(text).value == value


@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.data())
def test_precedence_is_python_s(numbers, data):
    operators = [data.draw(st.sampled_from([" + ", " - ", " * ", " / "])) for _ in numbers[1:]]
    pairs = itertools.zip_longest(numbers, operators, fillvalue="")
    text = "".join(f"{n}{operator}" for n, operator in pairs)
    oracle = eval(
        "".join(
            f"Fraction({n}){o}" for n, o in itertools.zip_longest(numbers, operators, fillvalue="")
        )
    )
    assert game24.parse(text) == (oracle, tuple(numbers))


@pytest.mark.parametrize(
    "text",
    [
        "(6 - 5) * 3 * 8",
        "#### (6 - 5) * 3 * 8",
        "#### (6-5)*3*8 = 24",
        "#### 24 = (6-5)*3*8",
        "6 - 5 = 1 (left: 1 3 8)\n#### **(6-5)*3*8 = 24.**",
        "The answer is: (6 - 5) \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 8.",
        "So \\boxed{(6 - 5) \\times 3 \\times 8}",
        "8 / ((5 - 3) / 6)",
        "3 * 8 = 24 (left: 24)\n(6 - 5) * 3 * 8 = 24",
    ],
)
def test_right_answers(text):
    verdict = game24.verify(PROBLEM, Gold(), text)
    assert verdict.correct is True
    assert verdict.reward == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "24",
        "#### 24 = 24",
        "3 * 8",
        "3 * 8 * 1 * 1",
        "(6 - 5) * 3 * 8 * 8 / 8",
        "3 + 5 + 6 + 8",
        "1/0",
        "3 * 8 / (6 - 6)",
        "2**9",
        "3**5 - 6 * 8",
        "3 * 8 // (6 - 5)",
        "(6 - 5) * 3 * 8 = 25",
        "(6 - 5) * 3 * 8\n#### (6 - 5) * 3 * 8 = 25",
        "(6 - 5) * 3 * 8 = 24 = 24",
        "(6 - 5) * 3 * 8 + 0",
        "(6 - 5)(3)(8)",
        "-(5 - 6) * 3 * 8",
        "35 - 6 - 8",
        "(6 - 5) * 3 * \N{FULLWIDTH DIGIT EIGHT}",
        "(6 - 5) * 3 * \N{ARABIC-INDIC DIGIT EIGHT}",
        "(" * 50 + "(6 - 5) * 3 * 8" + ")" * 49,
        "(" * 100_000 + "3" + ")" * 100_000,
        "9" * 100_000,
        "__import__('os').system('true')",
        "(6 - 5) * 3 * 8; 24",
        "3 5 6 8",
        "+ - * /",
        "()",
        "8e0 * 3 * (6 - 5)",
        "8.0 * 3 * (6 - 5)",
        "#### " + "+".join("1" * 60),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_wrong_and_hostile_answers(text):
    verdict = game24.verify(PROBLEM, Gold(), text)
    assert verdict.correct is False
    assert verdict.reward == 0.0


def test_brackets_around_the_whole_do_no_harm():
    assert game24.verify(PROBLEM, Gold(), "(" * 50 + "(6 - 5) * 3 * 8" + ")" * 50).correct


def test_equal_numbers_count_as_often_as_given():
    problem = game24.make_problem((1, 1, 4, 6))
    assert game24.verify(problem, Gold(), "4 * 6 * 1 / 1").correct
    assert not game24.verify(problem, Gold(), "4 * 6 * 1").correct
    assert not game24.verify(problem, Gold(), "4 * 6 * 1 * 1 * 1").correct


@given(st.text(alphabet="0123456789+-*/() =.\n#\N{DIVISION SIGN}", max_size=60))
def test_any_text_gets_a_verdict(text):
    expression = game24.extract(text)
    assert expression is None or game24.extract(f"#### {expression}") == expression
    assert game24.verify(PROBLEM, Gold(), text).correct in (True, False)


def test_canonical_form_ignores_spacing():
    assert game24.extract("(6-5)*3  *8=24") == game24.extract("#### ( 6 - 5 ) * 3 * 8")


def test_solver_solves_all_published_puzzles(shared_data):
    examples = game24.load(shared_data / "game24" / "24.csv")
    assert len(examples) == 1362
    assert examples[900][0].id == "game24-900"
    for problem, gold in examples:
        solution = game24.solve(problem.data)
        assert solution is not None
        assert game24.verify(problem, gold, solution).correct, (problem, solution)


def test_solver_says_no_where_there_is_no_way():
    assert game24.solve((1, 1, 1, 1)) is None
    assert game24.solve((23,)) is None
    assert game24.solve((24,)) == "24"
    assert game24.solve((3, 3, 8, 8)) == "8 / (3 - (8 / 3))"


def test_prompt_shows_a_right_example():
    chat = game24.prompt(game24.make_problem((1, 2, 3, 4)))
    assert chat[-1]["content"] == "Make 24 out of 1 2 3 4."
    assert game24.verify(PROBLEM, Gold(), chat[-2]["content"]).correct


@pytest.mark.parametrize("row", ["1,1 1 4", "1,1 1 4 x", "1,", "1", "1,1 2 3 4 5"])
def test_a_broken_file_names_its_row(tmp_path, row):
    path = tmp_path / "24.csv"
    path.write_text(f"Rank,Puzzles\n1,1 1 4 6\n{row}\n")
    with pytest.raises(ValueError, match="row 1"):
        game24.load(path)
