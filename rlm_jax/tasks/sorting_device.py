"""Sorting on token ids: the list read from the prompt, the answer judged by counts and descents.

The one idea: a list is the sorted form of another when it holds every digit as often and never
descends, so eleven counters take the place of the lists, whatever their length. `sorting.py` says
the same with lists. Steps before the answer cannot be told: each is legal.
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
    is_one_of,
    make_token_bytes,
    read_answer_byte,
    select,
)
from rlm_jax.tasks.device import DeviceTask, StepCheck

SEPARATORS = b" \t\r\v\f\n,;:#*$`(){}"

_OPENING = b"Sort ["
_DIGITS = b"0123456789"
# What the word so far is: nothing, a digit, a digit and dots.
_BETWEEN, _DIGIT, _DOTTED = range(3)


@struct
class DigitLine:
    """The digits of a line behind its last `[`.

    Attributes:
      word: what the word so far is.
      counts: how often each digit stands there.
      last: the last digit.
      descends: a digit follows a greater one.
      valid: nothing but single digits and separators.
      closed: behind `]`.
    """

    word: Int32[Array, ""]
    counts: Int32[Array, "10"]
    last: Int32[Array, ""]
    descends: Bool[Array, ""]
    valid: Bool[Array, ""]
    closed: Bool[Array, ""]


@struct
class DigitStatement:
    """The list of the prompt while it is read.

    Attributes:
      matched: bytes of `Sort [` that the text ends on; all of them: inside a list.
      in_digit: the last byte is a digit.
      valid: only single digits so far.
      counts: how often each digit stands in the list so far.
      known: the last whole statement is a list of one or more digits.
      value: its counts.
    """

    matched: Int32[Array, ""]
    in_digit: Bool[Array, ""]
    valid: Bool[Array, ""]
    counts: Int32[Array, "10"]
    known: Bool[Array, ""]
    value: Int32[Array, "10"]


@struct
class SortingState:
    """How often each digit was given, whether a list was, and how far the solution was read."""

    known: Bool[Array, ""]
    given: Int32[Array, "10"]
    answer: AnswerLine


def begin(tables: TokenBytes, ids: Int32[Array, "T"], length: Int32[Array, ""]) -> SortingState:
    """Reads the last `Sort [...]` of the prompt; without one nothing is solved."""
    zero = jnp.zeros_like(length)
    no, counts = zero != 0, zero + jnp.zeros(10, jnp.int32)
    state = DigitStatement(
        matched=zero, in_digit=no, valid=no, counts=counts, known=no, value=counts
    )
    state = fold_bytes(tables, ids, length, _read_statement, state)
    return SortingState(
        known=state.known, given=state.value, answer=init_answer_line(_DIGIT_LINE, zero)
    )


def step(
    tables: TokenBytes,
    state: SortingState,
    ids: Int32[Array, "S"],
    length: Int32[Array, ""],
    ends: Bool[Array, ""],
) -> StepCheck:
    """Reads one step; solved by exactly the sorted list."""

    def read(answer, byte):
        return read_answer_byte(_DIGIT_LINE, answer, byte)

    answer = fold_bytes(tables, ids, length, read, state.answer)
    line, has_answer = conclude(_DIGIT_LINE, answer)
    is_sorted = line.valid & ~line.descends & jnp.all(line.counts == state.given)
    return StepCheck(
        state=SortingState(known=state.known, given=state.given, answer=answer),
        legal=jnp.ones_like(length, dtype=bool),
        solved=ends & state.known & has_answer & is_sorted,
        key=jnp.zeros_like(length).astype(jnp.uint32),
    )


DEVICE = DeviceTask(make_token_bytes, begin, step)


def _init_line(zero: Int32[Array, ""]) -> DigitLine:
    no = zero != 0
    return DigitLine(
        word=zero + _BETWEEN,
        counts=zero + jnp.zeros(10, jnp.int32),
        last=zero,
        descends=no,
        valid=~no,
        closed=no,
    )


def _read_line(state: DigitLine, byte: Int32[Array, ""]) -> DigitLine:
    digit = byte - ord("0")
    is_digit, is_dot = is_one_of(byte, _DIGITS), byte == ord(".")
    is_separator = is_one_of(byte, SEPARATORS)
    closes = byte == ord("]")
    lone = state.word == _BETWEEN
    good = jnp.where(is_digit, lone, jnp.where(is_dot, ~lone, is_separator | closes))
    word = jnp.where(is_digit, _DIGIT, jnp.where(is_dot, _DOTTED, _BETWEEN))
    read = DigitLine(
        word=word,
        counts=state.counts + (is_digit & (jnp.arange(10) == digit)),
        last=jnp.where(is_digit, digit, state.last),
        descends=state.descends | (is_digit & (digit < state.last)),
        valid=state.valid & good,
        closed=closes,
    )
    opened = _init_line(jnp.zeros_like(byte))
    return select(byte == ord("["), opened, select(state.closed, state, read))


def _finish_line(state: DigitLine) -> DigitLine:
    return state


_DIGIT_LINE = Automaton(_init_line, _read_line, _finish_line)


def _read_statement(state: DigitStatement, byte: Int32[Array, ""]) -> DigitStatement:
    opening = jnp.asarray(np.frombuffer(_OPENING, np.uint8), jnp.int32)
    inside = state.matched == len(_OPENING)
    is_digit = is_one_of(byte, _DIGITS)
    goes_on = inside & (is_digit | is_one_of(byte, b", "))
    closes = inside & (byte == ord("]"))
    # No byte of the opening but the first equals the first.
    fits = ~inside & (byte == opening[jnp.minimum(state.matched, len(_OPENING) - 1)])
    matched = jnp.where(fits, state.matched + 1, jnp.where(byte == opening[0], 1, 0))
    matched = jnp.where(goes_on, state.matched, matched)
    counts = state.counts + (is_digit & (jnp.arange(10) == byte - ord("0")))
    any_digit = jnp.sum(state.counts) > 0
    return DigitStatement(
        matched=matched,
        in_digit=inside & is_digit,
        valid=~inside | (state.valid & ~(is_digit & state.in_digit)),
        counts=jnp.where(inside, counts, 0),
        known=jnp.where(closes, state.valid & any_digit, state.known),
        value=jnp.where(closes, state.counts, state.value),
    )
