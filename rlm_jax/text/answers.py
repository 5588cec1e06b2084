"""Answer keys on the device: a hash of the last number that a row has written.

Votes among the leaves of a search compare answers without leaving the device. The one idea: a
small automaton reads the bytes of each token and keeps a hash of the number's value as it is
being written, so that `18`, `18.0`, `018` and `$18.00` have one key, and `1,000` that of `1000`.
Grading is not its business: `tasks/answers.py` reads numbers exactly, on the host.

What counts: a minus belongs to the number that follows at once, `$` between allowed, unless a word,
a number or a closing bracket stands before it (`10-3` ends on 3). Commas between digits are
skipped. Digits behind a letter or behind a second decimal point (`x2`, `1.5.2`) are no number. A
control token contributes nothing, so the digits around it join.
"""

import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int, Int32, UInt32
from rlm_jax.text.tokenizer import Tokenizer

# Classes of bytes: 0 to 9 are the digits themselves.
MINUS, COMMA, DOT, DOLLAR, LETTER, CLOSING, OTHER = range(10, 17)

# Modes of the automaton, by what the bytes so far end on.
(FREE, WORD, CLOSED, SIGN, POINT, SIGN_POINT, WHOLE, WHOLE_COMMA, WHOLE_POINT, FRACTION, DEAD,
 POINTS) = range(12)  # fmt: skip

# The mode that follows, by mode and class: any digit, then MINUS to OTHER.
NEXT_MODE = np.array(
    [  # digit    minus  comma        dot          dollar letter closing other
        [WHOLE, SIGN, FREE, POINT, FREE, WORD, CLOSED, FREE],  # FREE
        [DEAD, FREE, FREE, POINTS, FREE, WORD, CLOSED, FREE],  # WORD
        [WHOLE, FREE, FREE, POINTS, FREE, WORD, CLOSED, FREE],  # CLOSED
        [WHOLE, SIGN, FREE, SIGN_POINT, SIGN, WORD, CLOSED, FREE],  # SIGN
        [FRACTION, SIGN, FREE, POINTS, FREE, WORD, CLOSED, FREE],  # POINT
        [FRACTION, SIGN, FREE, POINTS, FREE, WORD, CLOSED, FREE],  # SIGN_POINT
        [WHOLE, FREE, WHOLE_COMMA, WHOLE_POINT, FREE, WORD, CLOSED, FREE],  # WHOLE
        [WHOLE, SIGN, FREE, POINT, FREE, WORD, CLOSED, FREE],  # WHOLE_COMMA
        [FRACTION, SIGN, FREE, POINTS, FREE, WORD, CLOSED, FREE],  # WHOLE_POINT
        [FRACTION, FREE, FREE, DEAD, FREE, WORD, CLOSED, FREE],  # FRACTION
        [DEAD, FREE, DEAD, DEAD, FREE, WORD, CLOSED, FREE],  # DEAD
        [WHOLE, SIGN, FREE, POINTS, FREE, WORD, CLOSED, FREE],  # POINTS
    ],
    np.int32,
)
# Modes inside a number: a digit continues it. From any other mode a digit begins a new one.
IN_NUMBER = np.isin(np.arange(12), [WHOLE, WHOLE_COMMA, WHOLE_POINT, FRACTION, DEAD])

HASH_ZERO = np.uint32(2166136261)  # FNV-1a's offset: the hash of no digits, hence of zero
HASH_PRIME = np.uint32(16777619)


@struct
class AnswerRule:
    """What every token says to the automaton. U distinct byte-class strings, at most C long.

    Attributes:
        string_of: the token's byte-class string.
        classes: the strings, padded.
        lengths: how long each string is.
    """

    string_of: Int32[Array, "V"]
    classes: Int32[Array, "U C"]
    lengths: Int32[Array, "U"]


@struct
class AnswerState:
    """Where the automaton of each row stands.

    Attributes:
        mode: what the bytes so far end on.
        digits_hash: of the last number's value without its sign.
        negative: whether the last number has a minus.
        num_decimals: digits of the last number behind its point.
        has_number: a number has been written.
    """

    mode: Int32[Array, "R"]
    digits_hash: UInt32[Array, "R"]
    negative: Bool[Array, "R"]
    num_decimals: Int32[Array, "R"]
    has_number: Bool[Array, "R"]


def _class_table() -> bytes:
    table = bytearray([OTHER] * 256)
    for chars, kind in (
        (b"-", MINUS),
        (b",", COMMA),
        (b".", DOT),
        (b"$", DOLLAR),
        (b")]", CLOSING),
    ):
        for char in chars:
            table[char] = kind
    for byte in range(128):
        if chr(byte).isalpha() or byte == ord("_"):
            table[byte] = LETTER
        elif chr(byte).isdigit():
            table[byte] = byte - ord("0")
    return bytes(table)


# A letter, closing bracket or other byte leads to one mode from everywhere, so only the last of a
# run matters; of a run of commas, dots or minuses, only whether it is longer than one.
_IDLE_RUN = re.compile(rb"[\x0e-\x10]+(?=[\x0e-\x10])")
_MARK_RUN = re.compile(rb"([\x0a-\x0c])\1{2,}")
_RULES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def make_answer_rule(tokenizer: Tokenizer) -> AnswerRule:
    """Tables of a tokenizer's vocabulary, made once per tokenizer object."""
    if tokenizer in _RULES:
        return _RULES[tokenizer]
    table = _class_table()
    strings: dict[bytes, int] = {}
    string_of = np.zeros(tokenizer.vocab_size, np.int32)
    for token in range(tokenizer.vocab_size):
        classes = tokenizer.token_bytes(token).translate(table)
        classes = _MARK_RUN.sub(rb"\1\1", _IDLE_RUN.sub(b"", classes))
        string_of[token] = strings.setdefault(classes, len(strings))
    padded = np.full((len(strings), max(map(len, strings))), OTHER, np.int32)
    for classes, i in strings.items():
        padded[i, : len(classes)] = list(classes)
    rule = AnswerRule(
        string_of=jnp.asarray(string_of),
        classes=jnp.asarray(padded),
        lengths=jnp.asarray([len(classes) for classes in strings], jnp.int32),
    )
    _RULES[tokenizer] = rule
    return rule


def init_answer_state(like: Int[Array, "R"]) -> AnswerState:
    """The state before any text, one row for each row of `like`."""
    zeros = jnp.zeros_like(like, dtype=jnp.int32)
    return AnswerState(
        mode=zeros + FREE,
        digits_hash=zeros.astype(jnp.uint32) + HASH_ZERO,
        negative=zeros != 0,
        num_decimals=zeros,
        has_number=zeros != 0,
    )


def update_answer(rule: AnswerRule, state: AnswerState, token: Int[Array, "R"]) -> AnswerState:
    """Reads one token per row; ids outside the vocabulary change nothing."""
    vocab_size = rule.string_of.shape[0]
    known = (token >= 0) & (token < vocab_size)
    string = rule.string_of[jnp.where(known, token, 0)]
    length = jnp.where(known, rule.lengths[string], 0)

    def read(i, state):
        new = _read_byte(state, rule.classes[string, i])
        return jax.tree.map(lambda n, old: jnp.where(i < length, n, old), new, state)

    return jax.lax.fori_loop(0, jnp.max(length, initial=0), read, state)


def _read_byte(state: AnswerState, byte_class: Int[Array, "R"]) -> AnswerState:
    mode = jnp.asarray(NEXT_MODE)[state.mode, jnp.maximum(byte_class - 9, 0)]
    is_digit = (byte_class < 10) & (mode != DEAD)
    begins = is_digit & ~jnp.asarray(IN_NUMBER)[state.mode]
    signed = (state.mode == SIGN) | (state.mode == SIGN_POINT)
    digits_hash = jnp.where(begins, HASH_ZERO, state.digits_hash)
    decimals = jnp.where(begins, 0, state.num_decimals) + (is_digit & (mode == FRACTION))
    # Zeros that lead, or that end the decimals, are not hashed: a decimal brings its position.
    counts = (byte_class > 0) | ((decimals == 0) & (digits_hash != HASH_ZERO))
    symbol = (byte_class + 1 + 16 * decimals).astype(jnp.uint32)
    return AnswerState(
        mode=mode,
        digits_hash=jnp.where(is_digit & counts, (digits_hash ^ symbol) * HASH_PRIME, digits_hash),
        negative=jnp.where(begins, signed, state.negative),
        num_decimals=decimals,
        has_number=state.has_number | is_digit,
    )


def answer_key(state: AnswerState) -> UInt32[Array, "R"]:
    """The key of the last number: equal for equal values, never 0; 0 where there is no number.

    A hash: two different values share a key once in about 4e9 pairs.
    """
    negative = state.negative & (state.digits_hash != HASH_ZERO)
    key = state.digits_hash ^ jnp.where(negative, jnp.uint32(0x9E3779B9), jnp.uint32(0))
    key = (key ^ (key >> 16)) * jnp.uint32(0x85EBCA6B)
    key = (key ^ (key >> 13)) * jnp.uint32(0xC2B2AE35)
    key = key ^ (key >> 16)
    return jnp.where(state.has_number, jnp.maximum(key, 1), 0).astype(jnp.uint32)
