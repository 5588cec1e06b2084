"""Multi-step arithmetic: generated expressions over whole numbers, with a difficulty dial.

The one idea: a random expression tree is evaluated while it grows, and an operator is only drawn
where its result is a whole number (and a product is at most `MAX_PRODUCT`), so the answer is
exact by construction. Difficulty in [0, 1] sets the number of operations (1 to 8) and the largest
operand (9 to 999). Problem i of a seed is the same whatever the number of problems.

    Compute (3 + 4) * 2 - 5.      ->      3 + 4 = 7
                                          7 * 2 = 14
                                          14 - 5 = 9
                                          #### 9

Self-verifying: the expression stands in the question, so its value is worked out from there; a
question without such a statement is judged by its gold. The answer is the one number of the
answer line (`answer_lines.py`), behind its last `=`. A line with two numbers, a malformed one
(`1,00`, `1.5.2`, `10-3`) or a sign that stands alone answers nothing.
"""

import operator
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from rlm_jax.tasks import arithmetic_device
from rlm_jax.tasks.answer_lines import find_answer_line
from rlm_jax.tasks.answers import MAX_NUMBER_CHARS, format_number, parse_number
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, Verdict, judge, make_chat
from rlm_jax.tasks.dial import check_dial
from rlm_jax.tasks.expression_device import MAX_BRACKETS, MAX_VALUE
from rlm_jax.tasks.expressions import PRECEDENCE, evaluate

MAX_OPERATIONS = 8
MAX_PRODUCT = 10**6

INSTRUCTION = (
    "You compute arithmetic expressions. Write one calculation per line. "
    'Finish with the line "#### " followed by the final number.'
)
EXAMPLE = ("Compute (3 + 4) * 2 - 5.", "3 + 4 = 7\n7 * 2 = 14\n14 - 5 = 9\n#### 9")

_OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_STATEMENT = re.compile(r"Compute ([-+*/() 0-9]+)\.")
_SIGN = rb"(?:[-+]|\xe2\x88\x92)"
_BETWEEN = re.compile(rb"[^-+*:/^.,\w\x80-\xff]+")
_NUMBER = re.compile(
    rb"[*:]*(" + _SIGN + rb"?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)((?:\.[0-9]*)?)[.,*:]*"
)
_LONE_SIGN = re.compile(rb"[*:]*" + _SIGN)
_CALCULATION = re.compile(rb"[ \t\r\n]*(-?[0-9]+) ?([-+*/]) ?(-?[0-9]+) ?= ?(-?[0-9]+)[ \t\r\n]*")


class _Term(NamedTuple):
    text: str
    value: int
    precedence: int


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the expression."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def extract(text: str) -> str | None:
    """The number on the answer line in canonical form, or None. See the module docstring."""
    line = find_answer_line(text)
    if line is None:
        return None
    numbers = []
    for word in _BETWEEN.split(line.rsplit(b"=", 1)[-1]):
        match = _NUMBER.fullmatch(word)
        if match:
            numbers.append(match)
        elif re.search(rb"[0-9]", word) or _LONE_SIGN.fullmatch(word):
            return None
    if len(numbers) != 1:
        return None
    sign, whole, decimals = numbers[0].groups()
    digits = whole.replace(b",", b"").lstrip(b"0") + decimals.rstrip(b"0")
    if len(digits) > MAX_NUMBER_CHARS:
        return None
    value = Fraction(f"0{digits.decode().rstrip('.')}")
    return format_number(value if sign in (b"", b"+") else -value)


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Compares the answer in `text` with the value of the expression in the question.

    Raises:
      ValueError: there is no such expression, and the gold answer is not a number.
    """
    expected = _find_value(problem.question)
    if expected is None and gold.answer is None:
        return judge(None, "no expression in the question and no gold answer")
    if expected is None:
        expected = parse_number(str(gold.answer))
    if expected is None:
        raise ValueError(f"{problem.id}: gold answer {gold.answer!r} is not a number")
    found = extract(text)
    if found is None:
        return judge(False, "no number on the answer line")
    right = found == format_number(expected)
    return judge(right, f"{found} {'=' if right else '≠'} {format_number(expected)}")


def is_false_calculation(step: str) -> bool:
    """Whether a step is one line `a + b = c` over whole numbers that does not hold.

    Everything else, also a line with numbers over `MAX_VALUE`, cannot be told and is not false.
    """
    match = _CALCULATION.fullmatch(step.encode("utf-8", "surrogatepass"))
    if match is None:
        return False
    left, sign, right, result = match.groups()
    if any(len(n.lstrip(b"-0")) > len(str(MAX_VALUE)) for n in (left, right, result)):
        return False
    a, b, c = int(left), int(right), int(result)
    if max(abs(a), abs(b), abs(c)) > MAX_VALUE:
        return False
    if sign == b"/":
        return b == 0 or b * c != a
    return _OPERATIONS[sign.decode()](a, b) != c


def work_out(expression: str) -> tuple[int, list[str]]:
    """The value of an expression and the calculations that lead to it, in order.

    Raises:
      ValueError: not an expression of whole numbers, + - * / and brackets; a division that leaves
        a remainder; a number over `MAX_VALUE` or over `MAX_BRACKETS` open brackets on the way.
    """
    lines: list[str] = []

    def read(token: str) -> int:
        if not (token.isascii() and token.isdigit()):
            raise ValueError(f"{token!r} is none of 0-9 + - * / ( )")
        return _checked(token)

    def apply(sign: str, left: int, right: int) -> int:
        if sign == "/" and (right == 0 or left % right):
            raise ValueError(f"{left} / {right} is no whole number")
        result = _checked(_OPERATIONS[sign](left, right))
        lines.append(f"{left} {sign} {right} = {result}")
        return result

    tokens = re.findall(r"[0-9]+|[^ ]", expression)
    try:
        return evaluate(tokens, read, apply, max_brackets=MAX_BRACKETS), lines
    except ValueError as error:
        raise ValueError(f"{expression!r:.80}: {error}") from None


def write_solution(problem: Problem) -> str:
    """A worked solution: one calculation a line, then the answer behind its mark.

    Raises:
      ValueError: the question states no expression, or one that `work_out` refuses.
    """
    found = _STATEMENT.findall(problem.question)
    if not found:
        raise ValueError(f"{problem.question!r} has no statement `Compute EXPRESSION.`")
    value, lines = work_out(found[-1])
    return "\n".join([*lines, f"#### {value}"])


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` examples at `difficulty`.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    num_operations = 1 + round(difficulty * (MAX_OPERATIONS - 1))
    max_operand = round(10 ** (1 + 2 * difficulty)) - 1
    examples = []
    for i in range(num_problems):
        rng = np.random.default_rng([seed, i])
        term = _make_term(rng, num_operations, max_operand)
        name = f"arithmetic-{difficulty:g}-{seed}-{i}"
        problem = Problem(f"Compute {term.text}.", (term.text,), name)
        examples.append((problem, Gold(str(term.value))))
    return examples


def _find_value(question: str) -> Fraction | None:
    found = _STATEMENT.findall(question)
    try:
        return Fraction(work_out(found[-1])[0]) if found else None
    except ValueError:
        return None


def _checked(value: str | int) -> int:
    if isinstance(value, str):
        value = int(value) if len(value.lstrip("0")) <= len(str(MAX_VALUE)) else MAX_VALUE + 1
    if abs(value) > MAX_VALUE:
        raise ValueError(f"a number over {MAX_VALUE} on the way")
    return value


def _make_term(rng: np.random.Generator, num_operations: int, max_operand: int) -> _Term:
    if num_operations == 0:
        value = int(rng.integers(1, max_operand + 1))
        return _Term(str(value), value, 3)
    split = int(rng.integers(num_operations))
    left = _make_term(rng, split, max_operand)
    right = _make_term(rng, num_operations - 1 - split, max_operand)
    signs = ["+", "-"]
    if abs(left.value * right.value) <= MAX_PRODUCT:
        signs.append("*")
    if right.value and left.value % right.value == 0:
        signs.append("/")
    return _join(left, signs[rng.integers(len(signs))], right)


def _join(left: _Term, sign: str, right: _Term) -> _Term:
    precedence = PRECEDENCE[sign]
    left_text = f"({left.text})" if left.precedence < precedence else left.text
    # a - (b - c) needs its brackets though precedences are equal; a * (b / c) keeps them so that
    # the calculations stay as small as the tree's.
    tight = precedence if sign == "+" else precedence + 1
    right_text = f"({right.text})" if right.precedence < tight else right.text
    value = _OPERATIONS[sign](left.value, right.value)
    return _Term(f"{left_text} {sign} {right_text}", value, precedence)


TASK = Task(
    "arithmetic", 2, True, prompt, extract, verify, generate=generate,
    device=arithmetic_device.DEVICE,
)  # fmt: skip
