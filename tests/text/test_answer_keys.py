"""Answer keys against a Python reading of the decoded text."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import PieceTokenizer

from rlm_jax.text.answers import answer_key, init_answer_state, make_answer_rule, update_answer
from rlm_jax.text.tokenizer import ByteTokenizer

# Written from the module's description, not from its automaton.
NUMBER = re.compile(
    rb"""
    (?P<dead> (?<=[A-Za-z_]) [0-9][0-9.,]* -? )
    | (?P<sign> (?<![A-Za-z_)\]0-9]) -+ (?:\$[$-]*)? )?
      (?P<value> [0-9]+(?:,[0-9]+)*(?P<tenths>\.[0-9]+)? | (?<![A-Za-z_)\].]) (?P<only>\.[0-9]+) )
      (?(tenths) (?:\.[0-9.,]*-?)? ) (?(only) (?:\.[0-9.,]*-?)? )
    """,
    re.VERBOSE,
)


PIECES = [b"", *(bytes([b]) for b in b"0123456789-.,$ a_)(\n%"), "\u2212€好".encode()]
PIECES += [b"12", b" $3", b".5", b"1,0", b"00", b"-1", b"--", b"....", b",,", b" apples", b"x2"]
PIECES += [b"0.0", b"1.50", b"99,999.990", b"= -", b"a) ", "€4".encode(), b"\xe5", b"1.2.3", b"- 7"]
TOKENIZER = PieceTokenizer(PIECES)


def last_number(text: bytes) -> Fraction | None:
    found = None
    for match in NUMBER.finditer(text):
        if match["value"] is None:
            continue
        found = Fraction(match["value"].replace(b",", b"").decode())
        sign = match["sign"]
        if sign:
            found = -found
    return found


@jax.jit
def read_all(rule, tokens):
    def step(state, token):
        state = update_answer(rule, state, token)
        return state, answer_key(state)

    return jax.lax.scan(step, init_answer_state(tokens[:, 0]), tokens.T)[1].T


def keys_of(ids: list[int], tokenizer=TOKENIZER, length: int = 16) -> np.ndarray:
    padded = np.full((1, length), tokenizer.vocab_size + 5, np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(read_all(make_answer_rule(tokenizer), jnp.asarray(padded)))[0, : len(ids)]


def key_of_text(text: str) -> int:
    return int(keys_of(ByteTokenizer().encode(text), BYTES, 64)[-1])


BYTES = ByteTokenizer()
KEYS_SEEN: dict[int, Fraction] = {}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=16))
def test_key_is_that_of_the_last_number_at_every_token(ids):
    text = b""
    for token, key in zip(ids, keys_of(ids), strict=True):
        text += PIECES[token]
        value = last_number(text)
        assert (key == 0) == (value is None), text
        if value is not None:
            # One value, one key, over all examples and however the text was cut into tokens.
            assert key == key_of_value(value), text
            assert KEYS_SEEN.setdefault(int(key), value) == value, text


def key_of_value(value: Fraction) -> int:
    sign = "-" if value < 0 else ""
    whole, rest = divmod(abs(value), 1)
    places = next(n for n in range(100) if 10**n % rest.denominator == 0)
    decimals = str(int(rest * 10**places)).zfill(places) if places else ""
    return key_of_text(f"{sign}{whole}.{decimals}" if places else f"{sign}{whole}")


def test_ways_to_write_a_value_share_its_key():
    for group in (
        [
            "18",
            "18.0",
            "018",
            "$18.00",
            "is 18.",
            "**18**",
            "18%",
            "9+9=18",
            "(18)",
            "x = 18",
            "20-18",
        ],
        ["1000", "1,000", "$1,000.00", "1000.0", "x 1,000, "],
        ["-3.5", "-$3.50", "= -3.5", "$-3.5", "03 and -03.50"],
        ["0", "-0", "0.00", "000", "-.0"],
        [".5", "0.5", " .50"],
    ):
        assert len({key_of_text(text) for text in group}) == 1, group


def test_different_values_have_different_keys():
    texts = ["0", "1", "10", "100", "0.1", "0.01", "1.01", "10.1", "-1", "-10", "101", "1.1", "11"]
    assert len({key_of_text(text) for text in texts}) == len(texts)
    assert key_of_text("no number, x2 - .") == 0


def test_rows_are_independent_and_rule_is_cached():
    rule = make_answer_rule(TOKENIZER)
    assert make_answer_rule(TOKENIZER) is rule
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(PIECES), (8, 12)).astype(np.int32)
    together = np.asarray(read_all(rule, jnp.asarray(rows)))
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(together[i], keys_of(row.tolist()))
