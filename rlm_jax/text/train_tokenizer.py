"""SentencePiece models made by the pipeline itself: from texts, or from a puzzle's alphabet.

The one idea: what must be one token is declared, never hoped for. Declared symbols are matched
longest first, before any learned piece; all other text is cut into learned pieces, digits one by
one, and into bytes where no piece fits. So every text without SentencePiece's own space mark
comes back as it was.

The first four ids of every model are `<pad>`, `<s>`, `</s>` and `<unk>` (which no text becomes);
the symbols follow in the order given, then the bytes, then what was learned.
"""

import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from rlm_jax.core.files import write_whole
from rlm_jax.text.tokenizer import SPACE_MARK, load_tokenizer, utf8_bytes

PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
STEP_MARK = "<eois>"
ANSWER_MARK = "####"
DEFAULT_SYMBOLS = ("\n", STEP_MARK, ANSWER_MARK)
PUZZLE_SIGNS = ("+", "-", "*", "/", "=", ":", ";", ",", ".", "(", ")", ANSWER_MARK)
MODEL_TYPES = ("bpe", "unigram")

_NUM_CONTROL = 4
_NUM_BYTES = 256


def train_tokenizer(
    path: str | os.PathLike[str],
    texts: Iterable[str],
    *,
    vocab_size: int,
    symbols: Sequence[str] = DEFAULT_SYMBOLS,
    model_type: str = "bpe",
    add_space_prefix: bool = True,
    max_lines: int | None = None,
    seed: int = 0,
) -> None:
    """Trains a SentencePiece model and writes it, whole or not at all.

    The same texts, options and seed give the same file. It reads back by `load_tokenizer`.

    Args:
      path: the file, `NAME.model`; folders are made.
      texts: what to learn pieces from, line by line; symbols in it teach nothing.
      vocab_size: at most so many ids, fewer where the texts have no more to learn.
      symbols: texts that always are one token, a leading space included (`" 10"`). A longer
        symbol wins over a shorter one that it begins with.
      model_type: one of `MODEL_TYPES`.
      add_space_prefix: a text is read as if a space stood before it, so that a word has one token
        at the beginning and elsewhere; `decode` takes it off again.
      max_lines: learn from so many lines only, drawn by `seed`.
      seed: of that draw.

    Raises:
      ValueError: a bad option, symbols that are empty, doubled or reserved, no text to learn
        from, too small a vocabulary, or sentencepiece is not installed.
    """
    path = _check_path(path)
    pieces = _check_symbols(symbols)
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r}; accepted: {', '.join(MODEL_TYPES)}")
    if max_lines is not None and max_lines < 1:
        raise ValueError(f"max_lines must be at least 1, not {max_lines}")
    smallest = _NUM_CONTROL + len(pieces) + _NUM_BYTES
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(pieces)} symbols, {_NUM_CONTROL} control "
            f"tokens and {_NUM_BYTES} bytes make {smallest}"
        )
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    lines = list(lines) if max_lines is None else _draw(lines, max_lines, seed)
    if not lines:
        raise ValueError("there is no text to train a tokenizer on")
    _write(path, _train(lines, pieces, vocab_size, model_type, add_space_prefix))


def train_puzzle_tokenizer(
    path: str | os.PathLike[str],
    max_number: int = 999,
    *,
    bare_numbers: bool = True,
    symbols: Sequence[str] = (),
) -> None:
    r"""Writes the vocabulary of number puzzles: one token a number, one a sign, nothing learned.

    For text like `24 : 4 4 7 10\n10 - 4 = 6 ; 4 6 7\n`: a space belongs to the number or sign
    behind it, and the newline is a token of its own. Other text is spelled in bytes.

    Args:
      path: the file, `NAME.model`.
      max_number: the numbers 0 to this one, with a space before them, are tokens. A larger one is
        cut from the left into the longest that are.
      bare_numbers: numbers without a space before them, as behind a newline or bracket, are
        tokens of their own too. Without them the vocabulary is half as large, and a text whose
        lines begin with a space (`\n 10 - 4`) has one form of every number.
      symbols: further symbols, with or without a leading space.

    Raises:
      ValueError: a bad option, or sentencepiece is not installed.
    """
    if not 9 <= max_number <= 99_999:
        raise ValueError(f"max_number must lie in 9 to 99999, not {max_number}")
    numbers = [str(n) for n in range(max_number + 1)]
    all_symbols = ["\n", " ", *(f" {sign}" for sign in PUZZLE_SIGNS), *PUZZLE_SIGNS]
    all_symbols += [f" {n}" for n in numbers] + (numbers if bare_numbers else []) + [*symbols]
    path, pieces = _check_path(path), _check_symbols(all_symbols)
    vocab_size = _NUM_CONTROL + len(pieces) + _NUM_BYTES
    # A text made of symbols alone has nothing to learn from, and no training without a text.
    _write(path, _train([" "], pieces, vocab_size, "bpe", True))


def _check_path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix != ".model":
        raise ValueError(f"a SentencePiece model is named NAME.model, not {path.name!r}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    return path


def _check_symbols(symbols: Sequence[str]) -> list[str]:
    """The symbols as SentencePiece writes them."""
    taken = {"<pad>", "<s>", "</s>", "<unk>"}
    for symbol in symbols:
        if not symbol or SPACE_MARK in symbol or "\0" in symbol or "\r" in symbol:
            raise ValueError(
                f"symbol {symbol!r}: a symbol is not empty and holds no {SPACE_MARK!r}, NUL or CR"
            )
        if symbol in taken:
            raise ValueError(f"symbol {symbol!r} is taken")
        utf8_bytes(symbol)
        taken.add(symbol)
    return [symbol.replace(" ", SPACE_MARK) for symbol in symbols]


def _draw(lines: Iterable[str], num_lines: int, seed: int) -> list[str]:
    """A uniform sample of lines in one pass (reservoir), in the order of the draw."""
    rng = np.random.default_rng(seed)
    drawn: list[str] = []
    for i, line in enumerate(lines):
        if i < num_lines:
            drawn.append(line)
        elif (place := int(rng.integers(i + 1))) < num_lines:
            drawn[place] = line
    return drawn


def _train(
    lines: Sequence[str], pieces: Sequence[str], vocab_size: int, model_type: str, prefix: bool
) -> bytes:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            "training a tokenizer needs sentencepiece: pip install 'rlm_jax[text]'"
        ) from error
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=list(pieces),
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=prefix,
            # Longer lines would be left out without a word; it accepts no limit below 10.
            max_sentence_length=max(10, 1 + max(len(line.encode()) for line in lines)),
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            num_threads=1,  # sums in one order: the same file every time
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"SentencePiece could not train on these texts: {error}") from error
    return model.getvalue()


def _write(path: pathlib.Path, model: bytes) -> None:
    """Puts the file in its place at once, after it was read back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as beside:
        beside.write_bytes(model)
        load_tokenizer(beside)
