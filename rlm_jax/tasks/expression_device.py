"""An expression in a prompt, evaluated inside jit while its bytes are read.

The one idea: one frame (a sum so far, a product so far) for every open bracket, so that precedence
needs no second pass. The statement is `Compute EXPRESSION.`; of several the last one counts.
`arithmetic.work_out` is the same thing with lists. Exact in int32: an expression with a number
over `MAX_VALUE` on the way has no value.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32
from rlm_jax.tasks.answer_device import is_one_of, select

MAX_VALUE = 10**8
MAX_BRACKETS = 8

_OPENING = b"Compute "
_DIGITS = b"0123456789"
_EXPRESSION_CHARS = _DIGITS + b"+-*/() "


@struct
class Statement:
    """The expression of the prompt while it is read; F frames, one for each open bracket.

    Attributes:
      matched: bytes of `Compute ` that the text ends on; all of them: inside an expression.
      num_chars: bytes of the expression so far.
      valid: they can begin an expression whose value can be judged.
      wants: a number or an open bracket must follow.
      in_number: the last byte is a digit.
      number: the number so far.
      depth: open brackets.
      sums: sums so far by frame.
      signs: +1 or -1: how the product joins the sum.
      products: products so far by frame.
      factors: `*` or `/` when one awaits its right side, else 0.
      known: the last whole statement has a value.
      value: that value.
    """

    matched: Int32[Array, ""]
    num_chars: Int32[Array, ""]
    valid: Bool[Array, ""]
    wants: Bool[Array, ""]
    in_number: Bool[Array, ""]
    number: Int32[Array, ""]
    depth: Int32[Array, ""]
    sums: Int32[Array, "F"]
    signs: Int32[Array, "F"]
    products: Int32[Array, "F"]
    factors: Int32[Array, "F"]
    known: Bool[Array, ""]
    value: Int32[Array, ""]


def init_statement(zero: Int32[Array, ""]) -> Statement:
    """The state before any prompt; `zero` is a 0 of the batch."""
    no, frames = zero != 0, zero + jnp.zeros(MAX_BRACKETS + 1, jnp.int32)
    return Statement(
        matched=zero, num_chars=zero, valid=no, wants=no, in_number=no, number=zero, depth=zero,
        sums=frames, signs=frames + 1, products=frames, factors=frames, known=no, value=zero,
    )  # fmt: skip


def read_statement(state: Statement, byte: Int32[Array, ""]) -> Statement:
    """Reads one byte of a prompt."""
    opening = jnp.asarray(np.frombuffer(_OPENING, np.uint8), jnp.int32)
    inside = state.matched == len(_OPENING)
    goes_on = inside & is_one_of(byte, _EXPRESSION_CHARS)
    closes = inside & (byte == ord(".")) & (state.num_chars > 0)
    # No byte of the opening but the first equals the first.
    fits = ~inside & (byte == opening[jnp.minimum(state.matched, len(_OPENING) - 1)])
    matched = jnp.where(fits, state.matched + 1, jnp.where(byte == opening[0], 1, 0))
    matched = jnp.where(goes_on, state.matched, matched)
    opens = fits & (matched == len(_OPENING))
    read = _read_expression(state, byte)
    value = read.sums[0] + read.signs[0] * read.products[0]
    is_whole = read.valid & ~read.wants & (read.depth == 0) & (jnp.abs(value) <= MAX_VALUE)
    fresh = init_statement(jnp.zeros_like(byte))
    fresh = replace(fresh, valid=fresh.depth == 0, wants=fresh.depth == 0)
    state = select(
        goes_on, read, replace(select(opens, fresh, state), known=state.known, value=state.value)
    )
    return replace(
        state,
        matched=matched,
        num_chars=jnp.where(goes_on, state.num_chars + 1, state.num_chars),
        known=jnp.where(closes, is_whole, state.known),
        value=jnp.where(closes, value, state.value),
    )


def _read_expression(state: Statement, byte: Int32[Array, ""]) -> Statement:
    """Reads one byte of an expression; any byte that is none of its ends the number before it."""
    is_digit = is_one_of(byte, _DIGITS)
    state = select(state.in_number & ~is_digit, _apply(state, state.number), state)
    begins = is_digit & ~state.in_number
    number = append_digit(jnp.where(begins, 0, state.number), byte)
    valid = state.valid & ~(begins & ~state.wants)
    state = replace(
        state, number=jnp.where(is_digit, number, state.number), in_number=is_digit, valid=valid
    )
    state = select(is_one_of(byte, b"+-*/"), _read_operator(state, byte), state)
    state = select(byte == ord("("), _open_bracket(state), state)
    return select(byte == ord(")"), _close_bracket(state), state)


def _apply(state: Statement, operand: Int32[Array, ""]) -> Statement:
    """Joins a finished operand to the product of the current frame."""
    here = jnp.arange(MAX_BRACKETS + 1) == state.depth
    product, factor = jnp.sum(here * state.products), jnp.sum(here * state.factors)
    fits, divisor = product_fits(product, operand), jnp.where(operand == 0, 1, operand)
    divides = (operand != 0) & (jnp.abs(product) % jnp.abs(divisor) == 0)
    cases = [factor == ord("*"), factor == ord("/")]
    joined = jnp.select(
        cases, [jnp.where(fits, product, 0) * operand, divide_exactly(product, divisor)], operand
    )
    can = jnp.select(cases, [fits, divides], jnp.abs(operand) <= MAX_VALUE)
    return replace(
        state,
        products=jnp.where(here, joined, state.products),
        valid=state.valid & can & (jnp.abs(operand) <= MAX_VALUE),
        wants=state.wants & False,
    )


def _read_operator(state: Statement, byte: Int32[Array, ""]) -> Statement:
    here = jnp.arange(MAX_BRACKETS + 1) == state.depth
    adds = here & is_one_of(byte, b"+-")
    sums = state.sums + state.signs * state.products
    fits = jnp.all(~adds | (jnp.abs(sums) <= MAX_VALUE))
    return replace(
        state,
        sums=jnp.where(adds, sums, state.sums),
        signs=jnp.where(adds, jnp.where(byte == ord("-"), -1, 1), state.signs),
        factors=jnp.where(here, jnp.where(is_one_of(byte, b"*/"), byte, 0), state.factors),
        valid=state.valid & ~state.wants & fits,
        wants=state.wants | True,
    )


def _open_bracket(state: Statement) -> Statement:
    depth = jnp.minimum(state.depth + 1, MAX_BRACKETS)
    here = jnp.arange(MAX_BRACKETS + 1) == depth
    return replace(
        state,
        depth=depth,
        sums=jnp.where(here, 0, state.sums),
        signs=jnp.where(here, 1, state.signs),
        products=jnp.where(here, 0, state.products),
        factors=jnp.where(here, 0, state.factors),
        valid=state.valid & state.wants & (state.depth < MAX_BRACKETS),
    )


def _close_bracket(state: Statement) -> Statement:
    here = jnp.arange(MAX_BRACKETS + 1) == state.depth
    value = jnp.sum(here * (state.sums + state.signs * state.products))
    valid = state.valid & ~state.wants & (state.depth > 0)
    outer = replace(state, depth=jnp.maximum(state.depth - 1, 0), valid=valid)
    return _apply(outer, value)


def append_digit(number: Int32[Array, "*n"], byte: Int32[Array, ""]) -> Int32[Array, "*n"]:
    """The number with one digit more, cut at MAX_VALUE + 1."""
    return jnp.minimum(number * 10 + byte - ord("0"), MAX_VALUE + 1)


def product_fits(a: Int32[Array, ""], b: Int32[Array, ""]) -> Bool[Array, ""]:
    """Whether |a * b| <= MAX_VALUE."""
    return (b == 0) | (jnp.abs(a) <= MAX_VALUE // jnp.maximum(jnp.abs(b), 1))


def divide_exactly(a: Int32[Array, ""], b: Int32[Array, ""]) -> Int32[Array, ""]:
    """a / b where b divides a."""
    return jnp.sign(a) * jnp.sign(b) * (jnp.abs(a) // jnp.abs(b))
