"""Steps: the rule against a reading of the decoded text, inside jit, and on the host."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import PieceTokenizer

from rlm_jax.text.steps import (
    StepSpec,
    init_step_state,
    make_step_rule,
    segment_ids,
    split_steps,
    update_step,
)
from rlm_jax.text.tokenizer import ByteTokenizer

PIECES = [b"<eos>", b"<eois>", b"a", b" b", b"\n", b"\n\n", b" ", b"\t", b"\r\n", b".\n", b".\n\n"]
PIECES += [b"\nc", b"\n\nd", b"e\n\nf", b" \n", b"\n ", b"\x0c", b"g\nh", b"\n \ni\n", b"", b"12"]
EOS, EOIS = 0, 1
TOKENIZER = PieceTokenizer(PIECES, eos=(EOS,))
KINDS = ("end_token", "newline", "blank_line", "fixed", "solution")
TOKEN_LISTS = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


def make_spec(kind, max_tokens=1000):
    return StepSpec(kind, max_tokens, EOIS if kind == "end_token" else None)


def reference_steps(spec, ids):
    """The definition, on the text of the step so far: no tables and no state."""
    separator = {"newline": rb"\S\s*\n", "blank_line": rb"\S\s*\n\s*\n"}.get(spec.kind)
    steps, step = [], []
    for token in ids:
        before = any(TOKENIZER.token_bytes(t).strip() for t in step if t != spec.end_token)
        step.append(token)
        text = b"".join(map(TOKENIZER.token_bytes, step))
        ended = separator is not None and re.search(separator, text)
        ended = ended or (token == spec.end_token and before)
        if ended or token == EOS or len(step) == spec.max_tokens:
            steps.append(step)
            step = []
    return [*steps, step] if step else steps


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(ids=TOKEN_LISTS, max_tokens=st.sampled_from([1, 3, 1000]))
def test_steps_are_those_of_the_text(kind, ids, max_tokens):
    spec = make_spec(kind, max_tokens)
    steps = split_steps(make_step_rule(spec, TOKENIZER), ids)
    assert steps == reference_steps(spec, ids)
    assert [token for step in steps for token in step] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_jit_equal_rows_on_the_host(kind):
    rule = make_step_rule(make_spec(kind, max_tokens=7), TOKENIZER)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, len(PIECES), (16, 30)).astype(np.int32)
    lengths = rng.integers(0, 31, 16)
    valid = np.arange(30) < lengths[:, None]
    segments = np.asarray(jax.jit(segment_ids)(rule, tokens, valid))
    for row, length, found in zip(tokens, lengths, segments, strict=True):
        steps = split_steps(rule, row[:length].tolist())
        expected = [i for i, step in enumerate(steps) for _ in step]
        assert found.tolist() == expected + [-1] * (30 - length)


def test_invalid_tokens_in_the_middle_leave_the_count_untouched():
    rule = make_step_rule(make_spec("newline"), TOKENIZER)
    tokens = jnp.array([2, 4, 4, 9, 2, 4])  # a \n \n .\n a \n
    valid = jnp.array([True, False, False, True, True, True])
    assert segment_ids(rule, tokens, valid).tolist() == [0, -1, -1, 0, 1, 1]


def read_flags(rule, ids):
    state = init_step_state(jnp.zeros(1, jnp.int32))
    flags = []
    for token in ids:
        state, ended, terminal = update_step(rule, state, jnp.array([token]))
        flags.append((bool(ended[0]), bool(terminal[0])))
    return flags


def test_blank_line_straddles_tokens_and_needs_content_before():
    rule = make_step_rule(make_spec("blank_line"), TOKENIZER)
    newline, space, text = 4, 6, 2
    for ids in ([text, newline, newline], [text, newline, space, newline], [9, 11], [text, 14, 15]):
        assert [ended for ended, _ in read_flags(rule, ids)] == [False] * (len(ids) - 1) + [True]
    assert not any(ended for ended, _ in read_flags(rule, [newline, newline, 5, space, newline]))
    assert not any(ended for ended, _ in read_flags(rule, [text, newline, text, newline]))


@pytest.mark.parametrize("kind", KINDS)
def test_final_token_ends_step_and_solution(kind):
    rule = make_step_rule(make_spec(kind), TOKENIZER)
    assert read_flags(rule, [2, EOS]) == [(False, False), (True, True)]
    assert read_flags(rule, [EOS]) == [(True, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_longest_step_and_state_after_it(kind):
    rule = make_step_rule(make_spec(kind, max_tokens=2), TOKENIZER)
    assert [ended for ended, _ in read_flags(rule, [2, 3, 2, 3])] == [False, True] * 2


def test_end_token_counts_only_after_content():
    rule = make_step_rule(make_spec("end_token"), TOKENIZER)
    flags = read_flags(rule, [EOIS, 4, EOIS, 2, EOIS])
    assert [ended for ended, _ in flags] == [False, False, False, False, True]


def test_ids_outside_the_vocabulary_are_blank():
    rule = make_step_rule(make_spec("newline"), TOKENIZER)
    assert read_flags(rule, [-1, len(PIECES) + 3, 4]) == [(False, False)] * 3
    assert split_steps(rule, []) == []


def test_state_keeps_the_shape_of_its_rows_under_scan():
    rule = make_step_rule(make_spec("blank_line"), ByteTokenizer())
    text = ["One.\n\nTwo.\n\n\nThree", "\n\nA\n \nB\n\nC\nD......."]
    tokens = jnp.array([ByteTokenizer().encode(t.ljust(22, "."))[:22] for t in text])
    assert segment_ids(rule, tokens)[:, -1].tolist() == [2, 2]
    assert segment_ids(rule, tokens[0]).tolist() == segment_ids(rule, tokens)[0].tolist()


@pytest.mark.parametrize(
    "arguments",
    [("sentence", 5), ("newline", 0), ("end_token", 5), ("newline", 5, 3), ("fixed", -1)],
)
def test_bad_specs_are_refused(arguments):
    with pytest.raises(ValueError, match=r"accepted|at least 1|end_token"):
        StepSpec(*arguments)


def test_end_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=f"end_token {len(PIECES)} is outside"):
        make_step_rule(StepSpec("end_token", 5, len(PIECES)), TOKENIZER)
