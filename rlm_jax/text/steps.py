"""The one definition of a reasoning step, on token ids, for use inside jit and on the host.

A step is a run of tokens that ends with a separator: an end-of-step token, a newline, a blank
line, or nothing but its length. The one idea: everything that the text of a token can say about
a boundary is put into tables over the vocabulary once (`StepRule`), so that finding boundaries
while decoding is a few gathers and booleans per token (`update_step`). Segmenting stored tokens
is a scan of the same function, so search, training and records cannot disagree.

A boundary counts only after some content (a non-whitespace byte): leading newlines belong to the
step that they precede, and a step is never empty. The token that carries the separator belongs to
the step it ends, together with whatever the same token holds behind the separator. A blank line
is two newlines with nothing but ASCII whitespace between; it may straddle tokens.
"""

import itertools
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Array, Bool, Int, Int32
from rlm_jax.text.tokenizer import Tokenizer

STEP_KINDS = ("end_token", "newline", "blank_line", "fixed", "solution")


@dataclass(frozen=True)
class StepSpec:
    """What a step is.

    Attributes:
        kind: one of STEP_KINDS, the separator; "fixed" ends a step only by length, "solution"
            makes the whole solution one step.
        max_tokens: longest step, separator included.
        end_token: the separator of kind "end_token"; of no use to the others.
    """

    kind: str
    max_tokens: int
    end_token: int | None = None

    def __post_init__(self):
        if self.kind not in STEP_KINDS:
            raise ValueError(f"step kind {self.kind!r}; accepted: {', '.join(STEP_KINDS)}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if (self.kind == "end_token") != (self.end_token is not None):
            raise ValueError(f"step kind {self.kind!r} with end_token={self.end_token}")


@struct
class StepRule:
    """A StepSpec compiled against a vocabulary: one boolean per token id and property.

    Attributes:
        ends: holds the separator, so it ends a step that has content already.
        ends_alone: holds content and the separator behind it, so it ends any step.
        starts_newline: begins with a newline, other whitespace aside.
        ends_newline: ends with a newline, other whitespace aside.
        blank: holds no content: whitespace only, a control token, or `end_token`.
        final: ends the step and the solution (end of text, end of turn).
    """

    ends: Bool[Array, "V"]
    ends_alone: Bool[Array, "V"]
    starts_newline: Bool[Array, "V"]
    ends_newline: Bool[Array, "V"]
    blank: Bool[Array, "V"]
    final: Bool[Array, "V"]
    kind: str = static()
    max_tokens: int = static()


@struct
class StepState:
    """Where each row stands inside its current step.

    Attributes:
        has_content: a non-blank token has been seen in this step.
        after_newline: content, then a newline, then nothing but whitespace.
        length: tokens of this step so far.
    """

    has_content: Bool[Array, "*R"]
    after_newline: Bool[Array, "*R"]
    length: Int32[Array, "*R"]


def make_step_rule(spec: StepSpec, tokenizer: Tokenizer) -> StepRule:
    """Compiles `spec` for the vocabulary of `tokenizer`.

    Raises:
        ValueError: `spec.end_token` lies outside the vocabulary.
    """
    vocab_size = tokenizer.vocab_size
    if spec.end_token is not None and not 0 <= spec.end_token < vocab_size:
        raise ValueError(f"end_token {spec.end_token} is outside the {vocab_size} token ids")
    tables = _token_tables(tokenizer)
    nothing, blank = np.zeros(vocab_size, bool), tables["blank"].copy()
    if spec.kind == "newline":
        ends, ends_alone = tables["newline"], tables["line_end"]
    elif spec.kind == "blank_line":
        ends, ends_alone = tables["blank_line"], tables["paragraph_end"]
    else:
        ends, ends_alone = nothing.copy(), nothing
        if spec.end_token is not None:
            ends[spec.end_token] = blank[spec.end_token] = True
    straddles = spec.kind == "blank_line"
    return StepRule(
        ends=jnp.asarray(ends),
        ends_alone=jnp.asarray(ends_alone),
        starts_newline=jnp.asarray(tables["starts_newline"] if straddles else nothing),
        ends_newline=jnp.asarray(tables["ends_newline"] if straddles else nothing),
        blank=jnp.asarray(blank),
        final=jnp.asarray(tables["final"]),
        kind=spec.kind,
        max_tokens=spec.max_tokens,
    )


_PATTERNS = {
    "newline": rb"\n",
    "line_end": rb"\S\s*\n",
    "blank_line": rb"\n\s*\n",
    "paragraph_end": rb"\S\s*\n\s*\n",
    "starts_newline": rb"\A\s*\n",
    "ends_newline": rb"\n\s*\Z",
}
_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _token_tables(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Properties of every token's bytes, once per tokenizer object."""
    if tokenizer in _TABLES:
        return _TABLES[tokenizer]
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tables = {name: np.zeros(len(pieces), bool) for name in (*_PATTERNS, "blank", "final")}
    tables["blank"][:] = [not piece.strip() for piece in pieces]
    tables["final"][list(tokenizer.eos_ids)] = True
    with_newline = [i for i, piece in enumerate(pieces) if b"\n" in piece]
    for name, pattern in _PATTERNS.items():
        search = re.compile(pattern).search
        hits = [i for i in with_newline if search(pieces[i])]
        tables[name][hits] = True
    _TABLES[tokenizer] = tables
    return tables


def init_step_state(like: Int[Array, "*R"]) -> StepState:
    """The beginning of a step, one row for each row of `like`."""
    zeros = jnp.zeros_like(like, dtype=jnp.int32)
    return StepState(has_content=zeros != 0, after_newline=zeros != 0, length=zeros)


def update_step(
    rule: StepRule, state: StepState, token: Int[Array, "*R"]
) -> tuple[StepState, Bool[Array, "*R"], Bool[Array, "*R"]]:
    """Reads one token per row.

    A step ends at its separator, at `max_tokens`, or at a final token; a final token ends the
    solution too. Ids outside the vocabulary (padding, or spare rows of an embedding) are blank.

    Returns:
        The next state, which is the beginning of a step in the rows that ended; `ended`: this
        token is the last one of its step; `terminal`: it is the last one of its solution.
    """

    def look_up(table: Bool[Array, "V"], default: bool = False) -> Bool[Array, "*R"]:
        return jnp.where(known, table[jnp.where(known, token, 0)], default)

    known = (token >= 0) & (token < rule.blank.shape[0])

    blank = look_up(rule.blank, default=True)
    terminal = look_up(rule.final)
    separated = look_up(rule.ends_alone) | (look_up(rule.ends) & state.has_content)
    has_content = state.has_content | ~blank
    after_newline = state.after_newline
    if rule.kind == "blank_line":
        starts = look_up(rule.starts_newline)
        separated |= starts & state.after_newline
        # A trailing newline opens a blank line; whitespace keeps it open.
        after_newline = (look_up(rule.ends_newline) & has_content) | (
            state.after_newline & blank & ~starts
        )
    length = state.length + 1
    ended = separated | terminal | (length >= rule.max_tokens)
    state = StepState(
        has_content=has_content & ~ended,
        after_newline=after_newline & ~ended,
        length=jnp.where(ended, 0, length),
    )
    return state, ended, terminal


def segment_ids(
    rule: StepRule,
    tokens: Int[Array, "*R T"],
    valid: Bool[Array, "*R T"] | None = None,
) -> Int32[Array, "*R T"]:
    """The step that each token belongs to, counted from 0; -1 where `valid` is False.

    Tokens that are not valid leave the count untouched, wherever they stand.
    """
    if valid is None:
        valid = jnp.ones_like(tokens, dtype=bool)

    def read(carry, inputs):
        state, step = carry
        token, is_valid = inputs
        new_state, ended, _ = update_step(rule, state, token)
        state = jax.tree.map(lambda new, old: jnp.where(is_valid, new, old), new_state, state)
        segment = jnp.where(is_valid, step, -1)
        return (state, step + (ended & is_valid)), segment

    first = tokens[..., 0] if tokens.shape[-1] else jnp.zeros(tokens.shape[:-1], tokens.dtype)
    carry = (init_step_state(first), jnp.zeros_like(first, dtype=jnp.int32))
    inputs = (jnp.moveaxis(tokens, -1, 0), jnp.moveaxis(valid, -1, 0))
    _, segments = jax.lax.scan(read, carry, inputs)
    return jnp.moveaxis(segments, 0, -1)


def split_steps(rule: StepRule, ids: Sequence[int]) -> list[list[int]]:
    """Cuts a token sequence into steps on the host, by `segment_ids`.

    The last step may be unfinished. Joined together, the steps are `ids` again.
    """
    if len(ids) == 0:
        return []
    # Padded to a power of two, so that few lengths are compiled.
    padded = np.zeros(max(64, 1 << (len(ids) - 1).bit_length()), np.int32)
    padded[: len(ids)] = ids
    segments = np.asarray(_segment_ids_jit(rule, padded))[: len(ids)]
    cuts = np.flatnonzero(np.diff(segments)) + 1
    bounds = [0, *cuts.tolist(), len(ids)]
    return [list(ids[i:j]) for i, j in itertools.pairwise(bounds)]


_segment_ids_jit = jax.jit(segment_ids)
