"""Numbers in text: equal when equal as numbers, never by their digits alone."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.tasks.answers import extract_number, find_numbers, format_number, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", 1000),
        ("1000.0", 1000),
        ("$1,000.00", 1000),
        ("1000", 1000),
        ("1e3", 1000),
        ("\\$1{,}000", 1000),
        ("$ 1,234,567.50", Fraction("1234567.5")),
        ("1.5", Fraction(3, 2)),
        ("15", 15),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("0.75", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("2 3/4", Fraction(11, 4)),
        ("2\\frac{3}{4} cups", Fraction(11, 4)),
        ("50%", 50),
        ("18 apples.", 18),
        ("5 m^2", 5),
        ("18.", 18),
        ("**18**", 18),
        ("-5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("- 5", 5),
        ("007", 7),
    ],
)
def test_reads_a_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eighteen",
        "1/0",
        "1.5.2",
        "1,00",
        "1,0000",
        "12/25/2024",
        "10:30",
        "2^10",
        "2**9",
        "10\N{SUPERSCRIPT TWO}",
        "1_000",
        "1e400",
        "9" * 5000,
        "15 or 16",
        "5-3",
        "Route 66",
        "\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT TWO}",
        "\N{FULLWIDTH DIGIT ONE}",
        "nan",
        "inf",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_refuses_what_is_no_number(text):
    assert parse_number(text) is None


fractions = st.fractions(max_denominator=10**6).filter(lambda x: abs(x) < 10**30)


@given(fractions)
def test_format_and_parse_are_inverse(value):
    assert parse_number(format_number(value)) == value
    assert Fraction(format_number(value)) == value


@given(st.integers(-(10**15), 10**15), st.integers(0, 3))
def test_all_ways_to_write_a_number_are_equal(value, num_zeros):
    zeros = "." + "0" * num_zeros if num_zeros else ""
    for text in (f"{value}{zeros}", f"{value:,}{zeros}", f"so {value:,}{zeros} dollars."):
        assert extract_number(text) == str(value)
    sign = "-" if value < 0 else ""
    assert extract_number(f"#### {sign}${abs(value):,}{zeros}") == str(value)


@given(fractions, fractions)
def test_different_numbers_have_different_forms(a, b):
    assert (format_number(a) == format_number(b)) == (a == b)


@given(st.lists(st.integers(-999, 999), max_size=6))
def test_finds_all_numbers_in_order(values):
    assert find_numbers(" and ".join(map(str, values))) == values


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("16 - 3 = 13\n#### 13\n", "13"),
        ("####18", "18"),
        ("####\n42", "42"),
        ("#### 9 * 2 = $18", "18"),
        ("#### 16/2 = 8", "8"),
        ("#### 9 * 2", None),
        ("so 7\n#### 3 + 4", None),
        ("#### 9 * 2\nThe answer is 18.", None),
        ("#### 12 of the 30 eggs", "12"),
        ("#### 5\nWait.\n#### 6", "6"),
        ("#### Step 3: 7 more\nThe answer is 9.", "9"),
        ("#### <number>\nso 7", "7"),
        ("Hence \\boxed{\\frac{3}{4}} of 12.", "0.75"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{1{,}000\\text{ dollars}}", "1000"),
        ("The answer is 18. There were 3 ducks.", "18"),
        ("**Answer:** **18** of 20", "18"),
        ("The final answer is 5 + 3 = 8.", "8"),
        ("The answer is 4 but \\boxed{5}", "5"),
        ("\\boxed{5} and #### 6", "6"),
        ("She has 5 and then 6 apples.", "6"),
        ("It rose by 3/4", "0.75"),
        ("none", None),
        ("", None),
        ("#### 1/0", None),
    ],
)
def test_extracts_the_answer(text, answer):
    assert extract_number(text) == answer


@given(st.text(alphabet="0123456789.,/-$#= \n\\{}boxedfracanswer is:*^e%", max_size=80))
def test_any_text_gives_a_canonical_number_or_none(text):
    answer = extract_number(text)
    assert answer is None or format_number(Fraction(answer)) == answer


@pytest.mark.parametrize(
    "piece", ["#### ", "\\boxed{", "answer is ", "1,000,", "9", "-", "1 1 1/", "\\frac{1}{", " "]
)
def test_hostile_text_is_read_to_its_end(piece):
    """A pattern that backtracks over all of it would take hours."""
    answer = extract_number(piece * 20_000)
    assert answer is None or format_number(Fraction(answer)) == answer
