"""The answer line of a solution on token ids: what `answer_lines.find_answer_line` says, in jit.

The one idea: a task's device verifier is a small automaton over bytes. This file hands it the bytes
of token ids, whatever the tokenizer (`fold_bytes`), and wraps the automaton of one line into one
that knows which line is the answer (`AnswerLine`). Its state is carried from step to step, so marks
and numbers may straddle tokens and steps.

Everything is for one row; callers vmap.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32, PyTree, Shaped
from rlm_jax.tasks.answer_lines import BLANKS, MARK

# Where a text stands to its answer marks.
NO_MARK, BEHIND_MARK, BEHIND_ANSWER = range(3)


@struct
class TokenBytes:
    """The bytes of every token, end to end.

    Attributes:
      pieces: all tokens' bytes.
      starts: where each token's bytes begin; one more entry for where the last end.
    """

    pieces: Shaped[Array, "Y"]
    starts: Int32[Array, "U"]


class Automaton(NamedTuple):
    """Reads one line, byte by byte.

    Attributes:
      init: any int32 scalar of the batch -> the state at a line's beginning.
      read: (state, byte) -> state. `#` and newline separate words.
      finish: state -> the state once the line has ended; changes nothing when applied again.
    """

    init: Callable[[Int32[Array, ""]], PyTree]
    read: Callable[[PyTree, Int32[Array, ""]], PyTree]
    finish: Callable[[PyTree], PyTree]


@struct
class AnswerLine:
    """How far a solution has been read.

    Attributes:
      mode: NO_MARK, BEHIND_MARK (the answer line is awaited or being read) or BEHIND_ANSWER.
      num_hashes: length of the run of `#` that the text ends on, whole marks taken off.
      blank: nothing but blanks so far on this line.
      line: the automaton's state on this line.
      kept: its finished state on the answer line so far.
      has_kept: there is one.
    """

    mode: Int32[Array, ""]
    num_hashes: Int32[Array, ""]
    blank: Bool[Array, ""]
    line: PyTree
    kept: PyTree
    has_kept: Bool[Array, ""]


def make_token_bytes(pieces: Sequence[bytes]) -> TokenBytes:
    """Tables of a vocabulary, from the bytes of its tokens in order; control tokens have none.

    Raises:
      ValueError: there are no tokens.
    """
    if not pieces:
        raise ValueError("a vocabulary of 0 tokens")
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    joined = np.frombuffer(b"".join(pieces) or b"\0", np.uint8)
    return TokenBytes(pieces=jnp.asarray(joined), starts=jnp.asarray(starts, jnp.int32))


def fold_bytes(
    tables: TokenBytes,
    ids: Int32[Array, "S"],
    length: Int32[Array, ""],
    read_fn: Callable[[PyTree, Int32[Array, ""]], PyTree],
    state: PyTree,
) -> PyTree:
    """Reads the bytes of the first `length` ids; ids outside the vocabulary have none."""
    known = (ids >= 0) & (ids < tables.starts.shape[0] - 1) & (jnp.arange(ids.shape[0]) < length)
    token = jnp.where(known, ids, 0)
    begins = tables.starts[token]
    sizes = jnp.where(known, tables.starts[token + 1] - begins, 0)
    # Tokens without bytes are squeezed out, so that the loop below has one byte a turn.
    slot = jnp.where(sizes > 0, jnp.cumsum(sizes > 0) - 1, ids.shape[0])
    begins = jnp.zeros_like(begins).at[slot].set(begins, mode="drop")
    squeezed = jnp.zeros_like(sizes).at[slot].set(sizes, mode="drop")

    def read(_, carry):
        state, i, j = carry
        state = read_fn(state, tables.pieces[begins[i] + j].astype(jnp.int32))
        is_last = j + 1 >= squeezed[i]
        return state, i + is_last, jnp.where(is_last, 0, j + 1)

    zero = jnp.zeros_like(length)
    return jax.lax.fori_loop(0, jnp.sum(sizes), read, (state, zero, zero))[0]


def init_answer_line(automaton: Automaton, like: Int32[Array, ""]) -> AnswerLine:
    """The state before any text."""
    zero = jnp.zeros_like(like)
    return AnswerLine(
        mode=zero + NO_MARK,
        num_hashes=zero,
        blank=zero == 0,
        line=automaton.init(zero),
        kept=automaton.init(zero),
        has_kept=zero != 0,
    )


def read_answer_byte(automaton: Automaton, state: AnswerLine, byte: Int32[Array, ""]) -> AnswerLine:
    """Reads one byte of a solution."""
    hashes = jnp.where(byte == MARK[0], state.num_hashes + 1, 0)
    is_mark = hashes == len(MARK)
    line = automaton.read(state.line, byte)
    blank = state.blank & is_one_of(byte, BLANKS)
    ends_line = is_mark | (byte == ord("\n"))
    closes = ends_line & ~blank & (state.mode != BEHIND_ANSWER)
    answered = closes & (state.mode == BEHIND_MARK)
    mode = jnp.where(answered, BEHIND_ANSWER, state.mode)
    return AnswerLine(
        mode=jnp.where(is_mark, BEHIND_MARK, mode),
        num_hashes=jnp.where(is_mark, 0, hashes),
        blank=blank | ends_line,
        line=select(ends_line, automaton.init(jnp.zeros_like(byte)), line),
        kept=select(closes, automaton.finish(line), state.kept),
        has_kept=state.has_kept | closes,
    )


def conclude(automaton: Automaton, state: AnswerLine) -> tuple[PyTree, Bool[Array, ""]]:
    """The finished state on the answer line if the text ended here, and whether there is one."""
    is_open = ~state.blank & (state.mode != BEHIND_ANSWER)
    answer = select(is_open, automaton.finish(state.line), state.kept)
    return answer, state.has_kept | is_open


def select(chosen: Bool[Array, ""], left: PyTree, right: PyTree) -> PyTree:
    """`left` where `chosen`, else `right`, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(chosen, x, y), left, right)


def is_one_of(byte: Int32[Array, ""], chars: bytes) -> Bool[Array, ""]:
    """Whether a byte is among `chars`."""
    table = np.zeros(256, bool)
    table[list(chars)] = True
    return jnp.asarray(table)[byte]
