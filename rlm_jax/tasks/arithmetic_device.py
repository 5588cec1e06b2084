"""Arithmetic on token ids: the expression read from the prompt, answers and calculations checked.

The one idea: `begin` evaluates the last statement `Compute EXPRESSION.` of the prompt while it
reads it, with one frame (a sum so far, a product so far) for every open bracket; `step` follows
two automata at once, the answer line's number and "is this step one calculation `a + b = c`". A
false calculation is not legal: nothing good follows from it. `arithmetic.py` says the same with
regular expressions, `verify` for `solved` and `is_false_calculation` for `legal`.

Exact in int32: numbers over `MAX_VALUE` are never equal to a value and never judged.
"""

import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32
from rlm_jax.tasks.answer_device import (
    AnswerLine,
    Automaton,
    TokenBytes,
    conclude,
    fold_bytes,
    init_answer_line,
    make_token_bytes,
    read_answer_byte,
)
from rlm_jax.tasks.device import DeviceTask, StepCheck
from rlm_jax.tasks.expression_device import (
    MAX_VALUE,
    append_digit,
    divide_exactly,
    init_statement,
    product_fits,
    read_statement,
)

# Classes of bytes for the number on the answer line; E2 88 92 is the minus sign U+2212.
_DIGIT, _COMMA, _DOT, _MINUS, _PLUS, _STAR, _LETTER, _E2, _88, _92, _BREAK = range(11)
# What the word so far is. _HEAD4: four or more digits; _GROUP1 to 3: digits behind a comma.
(_START, _SIGN, _SIGN_E2, _SIGN_88, _HEAD1, _HEAD2, _HEAD3, _HEAD4, _AT_COMMA, _GROUP1, _GROUP2,
 _GROUP3, _POINT, _FRACTION, _TAIL, _WORD, _SPOILT, _PLUS_SIGN) = range(18)  # fmt: skip


def _make_number_table() -> np.ndarray:
    table = np.full((18, 11), _SPOILT, np.int32)
    table[[_START, _SIGN, _PLUS_SIGN, _SIGN_E2, _SIGN_88, _WORD], 1:] = _WORD
    table[_START, [_DIGIT, _MINUS, _PLUS, _STAR, _E2]] = _HEAD1, _SIGN, _PLUS_SIGN, _START, _SIGN_E2
    table[[_SIGN, _PLUS_SIGN], _DIGIT] = _HEAD1
    table[_SIGN_E2, _88] = _SIGN_88
    table[_SIGN_88, _92] = _SIGN
    table[[_HEAD1, _HEAD2, _HEAD3, _HEAD4], _DIGIT] = _HEAD2, _HEAD3, _HEAD4, _HEAD4
    heads = [_HEAD1, _HEAD2, _HEAD3, _GROUP3]
    table[heads, _COMMA] = _AT_COMMA
    table[[*heads, _HEAD4], _DOT] = _POINT
    table[[*heads, _HEAD4], _STAR] = _TAIL
    table[_HEAD4, _COMMA] = _TAIL
    table[[_AT_COMMA, _GROUP1, _GROUP2], _DIGIT] = _GROUP1, _GROUP2, _GROUP3
    table[[_POINT, _FRACTION], _DIGIT] = _FRACTION
    for state in (_AT_COMMA, _POINT, _FRACTION, _TAIL):
        table[state, [_COMMA, _DOT, _STAR]] = _TAIL
    table[:, _BREAK] = _START
    return table


def _classify(groups: dict[bytes, int], rest: int) -> np.ndarray:
    table = np.full(256, rest, np.int32)
    for chars, kind in groups.items():
        table[list(chars)] = kind
    return table


_LETTERS = bytes(range(ord("A"), ord("Z") + 1)) + bytes(range(ord("a"), ord("z") + 1))
_DIGITS = b"0123456789"
_NUMBER_CLASS = _classify(
    {
        _LETTERS + b"_/^" + bytes(range(128, 256)): _LETTER,
        _DIGITS: _DIGIT,
        b",": _COMMA,
        b".": _DOT,
        b"-": _MINUS,
        b"+": _PLUS,
        b"*:": _STAR,
        b"\xe2": _E2,
        b"\x88": _88,
        b"\x92": _92,
    },
    _BREAK,
)
_NEXT_WORD = _make_number_table()
_IS_NUMBER = np.isin(
    np.arange(18),
    [_HEAD1, _HEAD2, _HEAD3, _HEAD4, _AT_COMMA, _GROUP3, _POINT, _FRACTION, _TAIL],
)
_SPOILS = np.isin(np.arange(18), [_SIGN, _PLUS_SIGN, _GROUP1, _GROUP2, _SPOILT])

# The calculation `a + b = c`: classes of bytes, then what the step so far is.
_C_DIGIT, _C_MINUS, _C_SIGN, _C_EQUALS, _C_SPACE, _C_WHITE, _C_OTHER = range(7)
_CALC_CLASS = _classify(
    {
        _DIGITS: _C_DIGIT,
        b"-": _C_MINUS,
        b"+*/": _C_SIGN,
        b"=": _C_EQUALS,
        b" ": _C_SPACE,
        b"\t\r\n": _C_WHITE,
    },
    _C_OTHER,
)
(_LEAD, _A_MINUS, _A, _A_SPACE, _AT_SIGN, _SIGN_SPACE, _B_MINUS, _B, _B_SPACE, _AT_EQUALS,
 _EQUALS_SPACE, _C_NEGATIVE, _C, _TRAIL, _NO) = range(15)  # fmt: skip
_NEXT_CALC = np.array(
    [  # digit  minus        sign      equals      space          white   other
        [_A, _A_MINUS, _NO, _NO, _LEAD, _LEAD, _NO],  # _LEAD
        [_A, _NO, _NO, _NO, _NO, _NO, _NO],  # _A_MINUS
        [_A, _AT_SIGN, _AT_SIGN, _NO, _A_SPACE, _NO, _NO],  # _A
        [_NO, _AT_SIGN, _AT_SIGN, _NO, _NO, _NO, _NO],  # _A_SPACE
        [_B, _B_MINUS, _NO, _NO, _SIGN_SPACE, _NO, _NO],  # _AT_SIGN
        [_B, _B_MINUS, _NO, _NO, _NO, _NO, _NO],  # _SIGN_SPACE
        [_B, _NO, _NO, _NO, _NO, _NO, _NO],  # _B_MINUS
        [_B, _NO, _NO, _AT_EQUALS, _B_SPACE, _NO, _NO],  # _B
        [_NO, _NO, _NO, _AT_EQUALS, _NO, _NO, _NO],  # _B_SPACE
        [_C, _C_NEGATIVE, _NO, _NO, _EQUALS_SPACE, _NO, _NO],  # _AT_EQUALS
        [_C, _C_NEGATIVE, _NO, _NO, _NO, _NO, _NO],  # _EQUALS_SPACE
        [_C, _NO, _NO, _NO, _NO, _NO, _NO],  # _C_NEGATIVE
        [_C, _NO, _NO, _NO, _TRAIL, _TRAIL, _NO],  # _C
        [_NO, _NO, _NO, _NO, _TRAIL, _TRAIL, _NO],  # _TRAIL
        [_NO] * 7,  # _NO
    ],
    np.int32,
)


@struct
class NumberLine:
    """The numbers of a line behind its last `=`.

    Attributes:
      word: what the word so far is.
      value: its number's size so far, cut at MAX_VALUE + 1.
      negative: whether a minus leads it.
      whole: no decimal of it is other than 0.
      count: numbers so far; 2 also for anything that spoils the line.
    """

    word: Int32[Array, ""]
    value: Int32[Array, ""]
    negative: Bool[Array, ""]
    whole: Bool[Array, ""]
    count: Int32[Array, ""]


@struct
class Calculation:
    """A step read as `a + b = c`: `numbers` are the three, `phase` what has been read of it."""

    phase: Int32[Array, ""]
    sign: Int32[Array, ""]
    numbers: Int32[Array, "3"]
    negative: Bool[Array, "3"]


@struct
class ArithmeticState:
    """The value sought, whether there is one, and how far the solution has been read."""

    known: Bool[Array, ""]
    value: Int32[Array, ""]
    answer: AnswerLine


def begin(tables: TokenBytes, ids: Int32[Array, "T"], length: Int32[Array, ""]) -> ArithmeticState:
    """Evaluates the last `Compute EXPRESSION.` in the prompt; without one nothing is solved."""
    zero = jnp.zeros_like(length)
    statement = fold_bytes(tables, ids, length, read_statement, init_statement(zero))
    return ArithmeticState(
        known=statement.known, value=statement.value, answer=init_answer_line(_NUMBER, zero)
    )


def step(
    tables: TokenBytes,
    state: ArithmeticState,
    ids: Int32[Array, "S"],
    length: Int32[Array, ""],
    ends: Bool[Array, ""],
) -> StepCheck:
    """Reads one step: legal unless it is a false calculation, solved by the right answer."""

    def read(carry, byte):
        answer, calculation = carry
        return read_answer_byte(_NUMBER, answer, byte), _read_calculation(calculation, byte)

    carry = (state.answer, _init_calculation(jnp.zeros_like(length)))
    answer, calculation = fold_bytes(tables, ids, length, read, carry)
    number, has_answer = conclude(_NUMBER, answer)
    value = jnp.where(number.negative, -number.value, number.value)
    right = (number.count == 1) & number.whole & (value == state.value)
    return StepCheck(
        state=ArithmeticState(known=state.known, value=state.value, answer=answer),
        legal=~_is_false(calculation),
        solved=ends & state.known & has_answer & right,
        key=jnp.zeros_like(length).astype(jnp.uint32),
    )


DEVICE = DeviceTask(make_token_bytes, begin, step)


def _init_number(zero: Int32[Array, ""]) -> NumberLine:
    return NumberLine(
        word=zero + _START, value=zero, negative=zero != 0, whole=zero == 0, count=zero
    )


def _read_number(state: NumberLine, byte: Int32[Array, ""]) -> NumberLine:
    kind = jnp.asarray(_NUMBER_CLASS)[byte]
    word = jnp.asarray(_NEXT_WORD)[state.word, kind]
    ended = kind == _BREAK
    is_number = ended & jnp.asarray(_IS_NUMBER)[state.word]
    count = jnp.minimum(state.count + is_number, 2)
    count = jnp.where(ended & jnp.asarray(_SPOILS)[state.word], 2, count)
    begins = word == _HEAD1
    size = jnp.where(begins, 0, state.value)
    counts = ((word >= _HEAD1) & (word <= _HEAD4)) | ((word >= _GROUP1) & (word <= _GROUP3))
    size = jnp.where(counts, append_digit(size, byte), size)
    return NumberLine(
        word=word,
        value=size,
        negative=jnp.where(begins, state.word == _SIGN, state.negative),
        whole=begins | (state.whole & ((word != _FRACTION) | (byte == ord("0")))),
        count=jnp.where(byte == ord("="), 0, count),
    )


def _finish_number(state: NumberLine) -> NumberLine:
    return _read_number(state, jnp.zeros_like(state.word) + ord(" "))


_NUMBER = Automaton(_init_number, _read_number, _finish_number)


def _init_calculation(zero: Int32[Array, ""]) -> Calculation:
    zeros = zero + jnp.zeros(3, jnp.int32)
    return Calculation(phase=zero + _LEAD, sign=zero, numbers=zeros, negative=zeros != 0)


def _read_calculation(state: Calculation, byte: Int32[Array, ""]) -> Calculation:
    kind = jnp.asarray(_CALC_CLASS)[byte]
    phase = jnp.asarray(_NEXT_CALC)[state.phase, kind]
    growing = phase == jnp.array([_A, _B, _C])
    return Calculation(
        phase=phase,
        sign=jnp.where(phase == _AT_SIGN, byte, state.sign),
        numbers=jnp.where(growing, append_digit(state.numbers, byte), state.numbers),
        negative=state.negative | (phase == jnp.array([_A_MINUS, _B_MINUS, _C_NEGATIVE])),
    )


def _is_false(state: Calculation) -> Bool[Array, ""]:
    """Whether a step is a calculation that does not hold."""
    a, b, c = jnp.where(state.negative, -state.numbers, state.numbers)
    is_whole = (state.phase == _C) | (state.phase == _TRAIL)
    can_tell = is_whole & jnp.all(state.numbers <= MAX_VALUE)
    divisor = jnp.where(b == 0, 1, b)
    divides = (b != 0) & (jnp.abs(a) % jnp.abs(divisor) == 0)
    fits = product_fits(a, b)
    holds = jnp.select(
        [state.sign == ord("+"), state.sign == ord("-"), state.sign == ord("*")],
        [a + b == c, a - b == c, fits & (jnp.where(fits, a, 0) * b == c)],
        divides & (divide_exactly(a, divisor) == c),
    )
    return can_tell & ~holds
