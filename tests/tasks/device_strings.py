"""Hostile texts for device verifiers, and vocabularies to cut them with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.text.tokenizer import ByteTokenizer

NUM_ROWS = 1000
NUM_TOKENS = 320


def byte_pieces():
    """The vocabulary of the byte tokenizer; its control tokens have no bytes."""
    tokenizer = ByteTokenizer()
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


def multi_byte_pieces():
    """All bytes, then pieces that straddle marks, numbers, lines and characters; some empty."""
    words = [
        b"#", b"##", b"###", b"####", b"#####", b" ####", b"\n#", b"## ", b"# 1", b"\n\n",
        b"\n####", b"#### ", b" =", b"= ", b" = ", b", ", b"[", b"], ", b"] ", b" [", b"10", b"12",
        b"00", b"000", b",000", b".0", b" 3", b" -", b" - ", b"-1", b" + ", b" * ", b"1 ", b"2, 3",
        b"Compute ", b" Comp", b"ute", b"Sort", b"Sort [", b"t [", b"4.", b").", b" (", b"1, 1",
        b"\xe2\x88", b"\x88\x92", b"\xe2\x88\x92", b"\xd9", b"**", b"answer", b"", b"", b"7\n8",
    ]  # fmt: skip
    return [bytes([i]) for i in range(256)] + words


def encode(data, pieces, rng):
    """Token ids whose bytes are `data`, cut at random among the pieces that fit."""
    ids, start, by_first = [], 0, _index(tuple(pieces))
    while start < len(data):
        fits = [i for i in by_first[data[start]] if data.startswith(pieces[i], start)]
        ids.append(rng.choice(fits))
        start += len(pieces[ids[-1]])
        if rng.random() < 0.02:
            ids.append(pieces.index(b""))
    return ids


@functools.lru_cache
def _index(pieces):
    table = {}
    for i, piece in enumerate(pieces):
        if piece:
            table.setdefault(piece[0], []).append(i)
    return table


def to_bytes(text):
    """UTF-8, halves of surrogate pairs included."""
    return text.encode("utf-8", "surrogatepass")


def mix(texts, rng):
    """NUM_ROWS texts: the given ones, then random pairs of them end to end."""
    pairs = (rng.choice(texts) + rng.choice(texts) for _ in range(NUM_ROWS - len(texts)))
    return [*texts, *pairs]


@functools.cache
def compile_checker(device, pieces_fn):
    """A task's checker on one vocabulary, compiled once for all tests of a process."""
    return Checker(device, pieces_fn())


def trace_sharded(device, pieces):
    """The shapes of a check whose rows are split over two devices."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    rows, everywhere = jax.P("data"), jax.P()

    def check(tables, ids, lengths, ends):
        state = jax.vmap(device.begin, (None, 0, 0))(tables, ids, lengths)
        return jax.vmap(device.step, (None, 0, 0, 0, 0))(tables, state, ids, lengths, ends)

    sharded = jax.shard_map(
        check, mesh=mesh, in_specs=(everywhere, rows, rows, rows), out_specs=rows
    )
    ids, lengths = jnp.zeros((4, 8), jnp.int32), jnp.zeros(4, jnp.int32)
    return jax.eval_shape(sharded, device.make_tables(pieces), ids, lengths, lengths == 0)


class Checker:
    """A device task on one vocabulary, compiled once for batches of NUM_ROWS texts."""

    def __init__(self, device, pieces):
        self.pieces = pieces
        self.tables = device.make_tables(pieces)
        self.begin_rows = jax.jit(jax.vmap(device.begin, (None, 0, 0)))
        self.step_rows = jax.jit(jax.vmap(device.step, (None, 0, 0, 0, None)))

    def begin(self, prompts, rng):
        """The states behind prompts."""
        return self.begin_rows(self.tables, *self._encode(map(to_bytes, prompts), rng))

    def step(self, state, parts, rng, ends=True):
        """One step, given as bytes, for every row."""
        return self.step_rows(self.tables, state, *self._encode(parts, rng), jnp.array(ends))

    def is_solved(self, prompts, texts, rng):
        """Reads each text in three steps, cut between any two bytes, the last one ending it."""
        state, rests = self.begin(prompts, rng), list(map(to_bytes, texts))
        for ends in (False, False, True):
            cuts = [len(rest) if ends else rng.randint(0, len(rest)) for rest in rests]
            parts = [rest[:cut] for rest, cut in zip(rests, cuts, strict=True)]
            rests = [rest[cut:] for rest, cut in zip(rests, cuts, strict=True)]
            check = self.step(state, parts, rng, ends)
            assert ends or not check.solved.any()
            state = check.state
        return np.asarray(check.solved).tolist()

    def _encode(self, texts, rng):
        """Ids [NUM_ROWS, NUM_TOKENS] with hostile ids behind each length, and the lengths."""
        rows = [encode(text, self.pieces, rng) for text in texts]
        ids = np.full((NUM_ROWS, NUM_TOKENS), ord("9"), np.int32)
        lengths = np.zeros(NUM_ROWS, np.int32)
        for row, tokens in enumerate(rows):
            # An id past the vocabulary and a negative one say nothing.
            tokens = [*tokens[:1], len(self.pieces), -1, *tokens[1:]]
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return jnp.asarray(ids), jnp.asarray(lengths)
