"""Countdown's lines checked on token ids, inside jit: legal, solved, and where they lead.

The one idea: tokens become lexemes (numbers and signs) in one scan, whatever the vocabulary cuts
them into, and a line is then a fixed pattern of lexemes to compare with the numbers that are left.
It says what `countdown.verify` says of the same chain of lines. Answers behind an answer mark are
left to that function, and so are problems that are not in the task's notation: of their steps
nothing is known here.

A number of over nine digits is no number, here as there.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32, UInt32
from rlm_jax.tasks.device import DeviceTask, MoveList, Observation, StepCheck

MAX_NUMBERS = 8
MAX_DIGITS = 9
_MOST_SPELLED = 1000
_NONE = -1

_SIGNS = "+-*/=;:"
# What a token is: nothing, spaces, the end of a line, anything unknown, a number, or a sign.
_EMPTY, _SPACE, _NEWLINE, _OTHER, _NUMBER, _SIGN = range(6)
_PIECE = re.compile(rb"( *)(?:([0-9]{1,9})|([-+*/=;:]))")
_LINE_PATTERN = 5


@struct
class Tables:
    """What each token of a vocabulary is.

    value: of a number, or a sign's place in `_SIGNS`. digits: of a number. spaced: begins with a
    space. number, sign, digit: how the task's own text spells numbers up to 999 and signs, with a
    space before them, and further digits; -1 where the vocabulary spells otherwise.
    """

    kind: Int32[Array, "V"]
    value: Int32[Array, "V"]
    digits: Int32[Array, "V"]
    spaced: Bool[Array, "V"]
    number: Int32[Array, "1000"]
    sign: Int32[Array, "7"]
    digit: Int32[Array, "10"]


@struct
class State:
    """What is left, and was left on the way: row k of `path` holds k + 1 numbers.

    path: numbers, falling, -1 where there are fewer; rows below `count` - 1 mean nothing.
    count: how many are left; 0 when it is not known. sound: rows that follow from the problem; the
    others are what a wrong line says that it leaves.
    """

    path: Int32[Array, "8 8"]
    count: Int32[Array, ""]
    target: Int32[Array, ""]
    sound: Bool[Array, "8"]


@struct
class Lexemes:
    """The numbers and signs of a text in order.

    signs: place in `_SIGNS`, -1 at numbers and behind the last. values: of numbers. spaced: a space
    stands before it. count: how many. bad: something else is among them, or behind a newline.
    ended: the text ends with a newline.
    """

    signs: Int32[Array, "L"]
    values: Int32[Array, "L"]
    spaced: Bool[Array, "L"]
    count: Int32[Array, ""]
    bad: Bool[Array, ""]
    ended: Bool[Array, ""]


def make_tables(pieces: Sequence[bytes]) -> Tables:
    """The tables of a vocabulary, from the bytes of its tokens."""
    columns = np.zeros((4, len(pieces)), np.int32)
    for token, piece in enumerate(pieces):
        columns[:, token] = _read_piece(piece)
    kind, value, digits, spaced = map(jnp.asarray, columns)
    number, sign, digit = map(jnp.asarray, _spell(columns))
    return Tables(kind, value, digits, spaced != 0, number, sign, digit)


def _spell(columns: np.ndarray) -> list[np.ndarray]:
    """`Tables.number`, `sign` and `digit`, of the other columns."""
    kind, value, digits, spaced = columns
    bare = (kind == _NUMBER) & (spaced == 0)
    found = []
    for size, chosen in (
        (_MOST_SPELLED, (kind == _NUMBER) & (spaced == 1) & (digits == _count_digits(value))),
        (len(_SIGNS), (kind == _SIGN) & (spaced == 1)),
        (10, bare & (digits == 1)),
    ):
        table = np.full(size, _NONE, np.int32)
        for token in np.flatnonzero(chosen & (value < size)):
            table[value[token]] = token
        found.append(table)
    larger = (kind == _NUMBER) & (digits > np.where(spaced == 1, 3, 1))
    if larger.any() or min(table.min() for table in found) < 0:
        # Numbers are cut elsewhere.
        found = [np.full_like(table, _NONE) for table in found]
    return found


def _count_digits(value):
    """Digits of whole numbers from 0 to 10 ** 9 - 1."""
    return 1 + sum((value >= 10**power) * 1 for power in range(1, MAX_DIGITS))


def begin(tables: Tables, tokens: Int32[Array, "T"], length: Int32[Array, ""]) -> State:
    """The problem that a prompt in the task's notation states: `24 : 4 4 7 10` and a newline."""
    # A target, a colon and the numbers.
    found = _read(tables, tokens, length, 2 + MAX_NUMBERS)
    count = found.count - 2
    order = jnp.arange(2 + MAX_NUMBERS)
    wanted = jnp.where(order == 1, _SIGNS.index(":"), _NONE)
    known = (found.signs == wanted).all() & ~found.bad & found.ended & (count >= 2)
    known &= (found.spaced | (order < 2) | (order >= found.count)).all()
    numbers = _sorted_values(found, 2)
    count = jnp.where(known, count, 0)
    is_here = jnp.arange(MAX_NUMBERS) == count - 1
    return State(
        path=jnp.where(is_here[:, None], numbers, _NONE),
        count=count,
        target=jnp.where(known, found.values[0], 0),
        sound=jnp.ones(MAX_NUMBERS, bool),
    )


def step(
    tables: Tables,
    state: State,
    tokens: Int32[Array, "S"],
    length: Int32[Array, ""],
    ends: Bool[Array, ""],
) -> StepCheck:
    """Checks one line, and says what is left behind it."""
    line = _read(tables, tokens, length, _LINE_PATTERN + 1 + MAX_NUMBERS)
    known = state.count > 0
    follows, numbers = _move(line, state)
    returns, last = _return(line, state)
    says, said = _say(line, state)
    is_last = state.count == 2
    sound = follows & state.sound[jnp.maximum(state.count - 1, 0)]
    solved = known & sound & is_last & (numbers[0] == state.target)
    # A line that was cut short may read differently once it goes on.
    whole = line.ended | ends | solved
    # Who takes the problem for solved is done.
    deluded = is_last & says & ~sound & (said[0] == state.target)
    legal = ~known | ((follows | returns) & whole & ~deluded)
    claims = known & says & ~follows & whole & ~deluded
    count = jnp.where(returns, last, state.count - 1)
    numbers = jnp.where(follows, numbers, said)
    numbers = jnp.where(returns, state.path[last - 1], numbers)
    is_here = jnp.arange(MAX_NUMBERS) == count - 1
    path = jnp.where(is_here[:, None], numbers, state.path)
    sound = jnp.where(is_here & ~returns, sound, state.sound)
    after = State(path, jnp.where(known, count, 0), state.target, sound)
    chain_only = known & (returns | (follows & is_last & ~solved))
    return StepCheck(after, legal, solved, state_key(after), known, chain_only, claims)


def state_key(state: State) -> UInt32[Array, ""]:
    """Hash of the numbers that are left and of the target; 0 of an unknown problem."""
    numbers = state.path[jnp.maximum(state.count - 1, 0)]
    key = hash_numbers(jnp.append(numbers, state.target))
    return jnp.where(state.count > 0, key, 0)


def find_left(state: State) -> UInt32[Array, "8"]:
    """`state_key` of what was left on the way here, 0 where there is nothing."""
    counts = jnp.arange(1, MAX_NUMBERS + 1)
    keys = jax.vmap(lambda count: state_key(dataclasses.replace(state, count=count)))(counts)
    known = (state.count > 0) & (counts > state.count) & (state.path[:, 0] >= 0)
    return jnp.where(known, keys, 0)


def _move(line: Lexemes, state: State) -> tuple[Bool[Array, ""], Int32[Array, "8"]]:
    """Whether a line is a right move, and what it leaves."""
    left, right, result = line.values[0], line.values[2], line.values[4]
    here = state.path[jnp.maximum(state.count - 1, 0)]
    numbers, has_left = _take_away(here, left)
    numbers, has_right = _take_away(numbers, right)
    numbers = -jnp.sort(-numbers.at[-1].set(result))
    rest = (_sorted_values(line, _LINE_PATTERN + 1) == numbers).all()
    says_rest = jnp.where(state.count == 2, line.count == _LINE_PATTERN, rest)
    is_right = _is_right(line.signs[1], left, right, result)
    return _has_shape(line) & has_left & has_right & is_right & says_rest, numbers


def _say(line: Lexemes, state: State) -> tuple[Bool[Array, ""], Int32[Array, "8"]]:
    """Whether a line reads as a move from here, right or wrong, and what it says is left."""
    is_last = state.count == 2
    num_lexemes = jnp.where(is_last, _LINE_PATTERN, _LINE_PATTERN + state.count)
    result = jnp.full(MAX_NUMBERS, _NONE, jnp.int32).at[0].set(line.values[4])
    said = jnp.where(is_last, result, _sorted_values(line, _LINE_PATTERN + 1))
    return _has_shape(line) & (state.count > 1) & (line.count == num_lexemes), said


def _return(line: Lexemes, state: State) -> tuple[Bool[Array, ""], Int32[Array, ""]]:
    """Whether a line goes back to what was left before, and how many numbers that are."""
    order = jnp.arange(line.signs.shape[0])
    wanted = jnp.where(order == 0, _SIGNS.index(":"), _NONE)
    apart = line.spaced | (order == 0) | (order >= line.count)
    in_shape = (line.signs == wanted).all() & apart.all() & ~line.bad
    count = line.count - 1
    place = jnp.clip(count - 1, 0, MAX_NUMBERS - 1)
    same = (_sorted_values(line, 1) == state.path[place]).all()
    return in_shape & (count > state.count) & (count <= MAX_NUMBERS) & same, count


def hash_numbers(numbers: Int32[Array, "*rows M"]) -> UInt32[Array, "*rows"]:
    """A key of M numbers in their order, never 0."""
    code = jnp.full(numbers.shape[:-1], 0x9E3779B9, jnp.uint32)
    for place in range(numbers.shape[-1]):
        code = (code ^ numbers[..., place].astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        code ^= code >> 13
    return jnp.maximum(code, 1)


def _read_piece(piece: bytes) -> tuple[int, int, int, int]:
    if not piece:
        return _EMPTY, 0, 0, 0
    if not piece.strip(b" "):
        return _SPACE, 0, 0, 1
    if re.fullmatch(rb" *\n[ \n]*", piece):
        return _NEWLINE, 0, 0, 0
    match = _PIECE.fullmatch(piece)
    if match is None:
        return _OTHER, 0, 0, 0
    spaces, number, sign = match.groups()
    if number is not None:
        return _NUMBER, int(number), len(number), int(bool(spaces))
    return _SIGN, _SIGNS.index(sign.decode()), 0, int(bool(spaces))


def _read(tables: Tables, tokens: Array, length: Array, most: int) -> Lexemes:
    """Scans tokens into at most `most` lexemes; more of them are bad."""
    place = jnp.arange(most)

    def scan(carry, token_and_index):
        found, digits, after_space = carry
        token, index = token_and_index
        kind = jnp.where(index < length, tables.kind[token], _EMPTY)
        value, width = tables.value[token], tables.digits[token]
        spaced = after_space | tables.spaced[token]
        goes_on = (kind == _NUMBER) & (digits > 0) & ~spaced
        is_new = (kind == _SIGN) | ((kind == _NUMBER) & ~goes_on)
        count = found.count + is_new
        here = place == count - 1
        scale = 10 ** jnp.where(digits + width > MAX_DIGITS, 0, width)
        before = jnp.where(here, found.values, 0)
        number = jnp.where(is_new, value, before * scale + value)
        numeric = kind == _NUMBER
        digits = jnp.where(numeric, jnp.where(goes_on, digits, 0) + width, digits)
        digits = jnp.where((kind == _EMPTY) | numeric, digits, 0)
        speaks = numeric | (kind == _SIGN)
        bad = found.bad | (kind == _OTHER) | (count > most) | (digits > MAX_DIGITS)
        bad |= found.ended & (speaks | (kind == _SPACE))
        found = Lexemes(
            signs=jnp.where(here & (kind == _SIGN), value, found.signs),
            values=jnp.where(here & numeric, number, found.values),
            spaced=jnp.where(here & is_new, spaced, found.spaced),
            count=count,
            bad=bad,
            # A newline before anything else belongs to no line.
            ended=found.ended | ((kind == _NEWLINE) & (count > 0)),
        )
        after_space = jnp.where(kind == _EMPTY, after_space, kind == _SPACE)
        return (found, digits, after_space), None

    zero = length * 0
    none = jnp.zeros_like(place) + zero
    start = Lexemes(none + _NONE, none, none != 0, zero, zero != 0, zero != 0)
    index = jnp.arange(tokens.shape[0])
    (found, _, _), _ = jax.lax.scan(scan, (start, zero, zero != 0), (tokens, index))
    return found


def _has_shape(line: Lexemes) -> Bool[Array, ""]:
    """number operator number = number, and perhaps ; and numbers apart."""
    order = jnp.arange(line.signs.shape[0])
    operator = (line.signs[1] >= 0) & (line.signs[1] < 4)
    wanted = jnp.where(order == 3, _SIGNS.index("="), _NONE)
    wanted = jnp.where((order == _LINE_PATTERN) & (line.count > order), _SIGNS.index(";"), wanted)
    fits = (line.signs == wanted) | (order == 1)
    apart = line.spaced | (order <= _LINE_PATTERN) | (order >= line.count)
    # A semicolon with nothing behind it is no rest.
    whole = (line.count == _LINE_PATTERN) | (line.count > _LINE_PATTERN + 1)
    return operator & fits.all() & apart.all() & whole & ~line.bad


def _sorted_values(line: Lexemes, start: int) -> Int32[Array, "8"]:
    """The numbers from lexeme `start` on, falling, -1 behind the last."""
    order = jnp.arange(line.values.shape[0])
    values = jnp.where(order < line.count, line.values, _NONE)[start:]
    return -jnp.sort(-values)[:MAX_NUMBERS]


def _take_away(numbers: Array, number: Array) -> tuple[Array, Array]:
    """`numbers` without one `number`, falling again, and whether it was there."""
    same = numbers == number
    first = same & (jnp.cumsum(same) == 1)
    return -jnp.sort(-jnp.where(first, _NONE, numbers)), same.any() & (number >= 0)


def _is_right(sign: Array, left: Array, right: Array, result: Array) -> Bool[Array, ""]:
    """left sign right = result, in 32 bits without overflow; all are below 10 ** 9."""
    fits = left.astype(jnp.float32) * right.astype(jnp.float32) < 1.1e9
    product = jnp.where(fits, left, 0) * jnp.where(fits, right, 0)
    divisor = jnp.maximum(right, 1)
    divides = (right > 0) & (left % divisor == 0) & (left // divisor == result)
    answers = [left + right == result, left - right == result, fits & (product == result), divides]
    return functools.reduce(
        jnp.logical_or, [(sign == place) & right_one for place, right_one in enumerate(answers)]
    )


def find_returns(tables: Tables) -> Bool[Array, "V"]:
    """The tokens that a line begins with which goes back: `: 4 4 7 10`."""
    return (tables.kind == _SIGN) & (tables.value == _SIGNS.index(":"))


def find_marks(tables: Tables) -> Bool[Array, "V"]:
    """The tokens behind which stands what is left: `24 : 4 4 7 10`, `10 - 4 = 6 ; 4 6 7`."""
    marks = (_SIGNS.index(":"), _SIGNS.index(";"))
    return (tables.kind == _SIGN) & jnp.isin(tables.value, jnp.asarray(marks))


def observe(state: State) -> Observation:
    """The numbers that are left, and the target."""
    numbers = state.path[jnp.maximum(state.count - 1, 0)]
    known = state.count > 0
    return Observation(jnp.where(known, numbers, _NONE), jnp.where(known, state.target, _NONE))


@struct
class Moves:
    """All M pairs of numbers and signs from a state, the larger number first.

    rest: what is left behind it, rising, -1 in front where there are fewer. legal: it is one.
    """

    left: Int32[Array, "M"]
    sign: Int32[Array, "M"]
    right: Int32[Array, "M"]
    result: Int32[Array, "M"]
    rest: Int32[Array, "M 7"]
    legal: Bool[Array, "M"]


def _make_moves(state: State) -> Moves:
    here = state.path[jnp.maximum(state.count - 1, 0)]
    first, second = np.triu_indices(MAX_NUMBERS, 1)
    sign = np.repeat(np.arange(4), len(first))
    first, second = np.tile(first, 4), np.tile(second, 4)
    # Numbers fall, so that the first is the larger one.
    left, right = here[first], here[second]
    # A product that is too large for 32 bits is not right either.
    quotient = left // jnp.maximum(right, 1)
    results = jnp.stack([left + right, left - right, left * right, quotient])
    result = results[sign, np.arange(len(sign))]
    sign = jnp.asarray(sign)
    legal = (result < 10**MAX_DIGITS) & (second < state.count)
    legal &= jax.vmap(_is_right)(sign, left, right, result)
    place = np.arange(MAX_NUMBERS)
    used = (place == first[:, None]) | (place == second[:, None])
    # Two are used up, and stand in front.
    rest = jnp.append(jnp.where(used, _NONE, here), result[:, None], -1)
    return Moves(left, sign, right, result, jnp.sort(rest)[:, 2:], legal)


def list_moves(
    tables: Tables, state: State, num_slots: int
) -> tuple[Int32[Array, "M S"], Int32[Array, "M"]]:
    """Tokens of every legal line, spelled as demonstrations are: `10 - 4 = 6 ; 4 6 7`.

    The larger number stands first. None of a problem that is not known, or where the vocabulary
    spells otherwise.
    """
    moves = _make_moves(state)
    rest = jnp.where(state.count == 2, _NONE, moves.rest)
    spell = functools.partial(_spell_line, tables, num_slots=num_slots)
    tokens, length = jax.vmap(spell)(moves.left, moves.sign, moves.right, moves.result, rest)
    fits = (tables.number[0] >= 0) & (length < num_slots)
    return tokens, jnp.where(moves.legal & fits, length, 0)


def list_outcomes(state: State) -> Observation:
    """What `observe` says behind every legal line that leaves more than one number."""
    moves = _make_moves(state)
    open_still = (moves.legal & (state.count > 2))[:, None]
    return Observation(
        jnp.where(open_still, moves.rest, _NONE),
        jnp.full_like(moves.result, state.target),
    )


def _spell_line(tables, left, sign, right, result, rest, *, num_slots):
    """Tokens of a line and how many they are; numbers of the rest are -1 where there is none."""
    parts = [
        _spell_number(tables, left),
        _spell_sign(tables, sign),
        _spell_number(tables, right),
        _spell_sign(tables, _SIGNS.index("=")),
        _spell_number(tables, result),
        _spell_sign(tables, jnp.where((rest >= 0).any(), _SIGNS.index(";"), _NONE)),
        *(_spell_number(tables, number) for number in rest),
    ]
    tokens = jnp.concatenate([part for part, _ in parts])
    there = jnp.concatenate([jnp.arange(part.shape[0]) < count for part, count in parts])
    place = jnp.where(there, jnp.cumsum(there) - 1, num_slots)
    return jnp.zeros(num_slots, jnp.int32).at[place].set(tokens, mode="drop"), there.sum()


def _spell_sign(tables, sign):
    return tables.sign[jnp.maximum(sign, 0)][None], jnp.asarray(sign >= 0, jnp.int32)


def _spell_number(tables, number):
    """Its first three digits, and each further one."""
    digits = _count_digits(number)
    powers = jnp.asarray(10 ** np.arange(MAX_DIGITS), jnp.int32)
    first = number // powers[jnp.maximum(digits - 3, 0)]
    behind = jnp.maximum(digits - 4 - jnp.arange(MAX_DIGITS - 3), 0)
    further = tables.digit[number // powers[behind] % 10]
    count = jnp.where(number >= 0, jnp.maximum(digits - 2, 1), 0)
    return jnp.append(tables.number[jnp.clip(first, 0, 999)], further)[: MAX_DIGITS - 2], count


def find_ends(tables: Tables) -> Bool[Array, "V"]:
    """The tokens that a line ends with: a newline, or what is no text."""
    return (tables.kind == _NEWLINE) | (tables.kind == _EMPTY)


DEVICE_TASK = DeviceTask(
    make_tables,
    begin,
    step,
    state_key,
    find_returns,
    observe,
    find_marks,
    find_left,
    MoveList(list_moves, find_ends, lambda tables: tables.number[0] >= 0),
    list_outcomes,
)
