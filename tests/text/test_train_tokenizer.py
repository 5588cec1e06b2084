import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.text.tokenizer import load_tokenizer
from rlm_jax.text.train_tokenizer import (
    ANSWER_MARK,
    BOS_ID,
    EOS_ID,
    PAD_ID,
    STEP_MARK,
    train_puzzle_tokenizer,
    train_tokenizer,
)

PUZZLE = "24 : 4 4 7 10\n10 - 4 = 6 ; 4 6 7\n"
TEXTS = [
    "Ben has 36 boxes with 12 pens each.\nHe has 36 * 12 = 432 pens.\n#### 432",
    "Ann has 17 pens and buys 25 more pens.\nAnn has 17 + 25 = 42 pens.\n#### 42",
    "The boxes cost 1999 dollars.",
] * 5
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=40)


def pieces_of(tokenizer, text):
    return [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def puzzle(tmp_path_factory):
    path = tmp_path_factory.mktemp("puzzle") / "tokenizer.model"
    train_puzzle_tokenizer(path)
    return load_tokenizer(path.parent)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    train_tokenizer(path, TEXTS, vocab_size=320, model_type=request.param)
    return load_tokenizer(path)


def test_a_puzzle_has_one_token_a_number_and_a_sign(puzzle):
    assert pieces_of(puzzle, PUZZLE) == [*re.findall(r"\n| ?[^ \n]+", " " + PUZZLE)]
    assert puzzle.decode(puzzle.encode(PUZZLE)) == PUZZLE
    assert (puzzle.bos_id, puzzle.eos_ids) == (BOS_ID, (EOS_ID,))
    assert puzzle.special_tokens == {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID}
    assert all(map(puzzle.is_special, [PAD_ID, BOS_ID, EOS_ID]))


def test_every_number_of_a_puzzle_is_one_token_and_its_own(puzzle):
    marked = [puzzle.encode(str(n)) for n in range(1000)]
    bare = [puzzle.encode(f"\n{n}")[-1:] for n in range(1000)]
    ids = [token for (token,) in marked + bare]
    assert len(set(ids)) == 2000
    assert [puzzle.token_bytes(i) for i in ids] == [
        *(f" {n}".encode() for n in range(1000)),
        *(f"{n}".encode() for n in range(1000)),
    ]
    pieces = pieces_of(puzzle, "(10 - 4) * 12345")
    assert pieces == [" (", "10", " -", " 4", ")", " *", " 123", "45"]


def test_a_puzzle_without_bare_numbers_is_half_as_large(tmp_path):
    path = tmp_path / "small.model"
    train_puzzle_tokenizer(path, 99, bare_numbers=False, symbols=[" left", "<go>"])
    tokenizer = load_tokenizer(path)
    assert pieces_of(tokenizer, "9 : 3 6\n 99 left<go>") == [
        *(" 9", " :", " 3", " 6", "\n", " 99", " left", "<go>")
    ]
    # control tokens, newline and space, twelve signs twice, numbers, two symbols, bytes
    assert tokenizer.vocab_size == 4 + 2 + 24 + 100 + 2 + 256


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(ANY_TEXT, st.text("0123456789 +-*/=:;\n()", max_size=40)))
def test_any_text_comes_back_from_a_puzzle_vocabulary(puzzle, text):
    ids = puzzle.encode(text)
    assert puzzle.decode(ids) == text
    assert b"".join(map(puzzle.token_bytes, ids)) == (f" {text}" if text else "").encode()


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(ANY_TEXT, st.sampled_from(TEXTS)))
def test_any_text_comes_back_from_a_trained_vocabulary(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_digits_are_split_and_marks_are_whole(trained):
    for text in TEXTS:
        for piece in pieces_of(trained, f"{text}{STEP_MARK}1999 432\n"):
            assert not re.search(r"\d.*\d", piece)
    pieces = pieces_of(trained, f"Ben has 36 boxes{STEP_MARK}{ANSWER_MARK} 42\n")
    assert {STEP_MARK, ANSWER_MARK, "\n"} <= set(pieces)
    assert any(len(piece.strip()) > 1 for piece in pieces if piece not in (STEP_MARK, ANSWER_MARK))
    assert trained.vocab_size <= 320


def test_symbols_come_first_in_the_order_given(tmp_path):
    symbols = [" pens", ",", '"', "\n", " "]
    train_tokenizer(tmp_path / "a.model", TEXTS, vocab_size=300, symbols=symbols)
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert [tokenizer.token_bytes(4 + i).decode() for i in range(5)] == symbols


def test_the_same_seed_gives_the_same_file(tmp_path):
    def train(name, **options):
        path = tmp_path / f"{name}.model"
        texts = (f"{word}{word} is {word}" for word in map(chr, range(0x61, 0x7B)))
        train_tokenizer(path, texts, vocab_size=290, **options)
        return path.read_bytes()

    first = train("a", max_lines=8, seed=3)
    assert train("b", max_lines=8, seed=3) == first
    assert train("c", max_lines=8, seed=4) != first
    assert train("d") == train("e", max_lines=26, seed=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{c}.model" for c in "abcde"]


def test_without_the_space_prefix_words_at_the_beginning_differ(tmp_path):
    path = tmp_path / "a.model"
    train_tokenizer(path, TEXTS, vocab_size=300, symbols=["7", " 7"], add_space_prefix=False)
    tokenizer = load_tokenizer(path)
    assert pieces_of(tokenizer, "7 7") == ["7", " 7"]
    assert tokenizer.decode(tokenizer.encode(" 7")) == " 7"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "a.json"}, "NAME.model"),
        ({"texts": ["", " \n"]}, "no text"),
        ({"vocab_size": 262}, "make 263"),
        ({"symbols": ["a", "a"]}, "'a' is taken"),
        ({"symbols": ["</s>"]}, "is taken"),
        ({"symbols": [""]}, "not empty"),
        ({"symbols": ["▁7"]}, "holds no '▁'"),
        ({"model_type": "word"}, "accepted: bpe, unigram"),
        ({"max_lines": 0}, "at least 1"),
        ({"vocab_size": 265}, "could not train"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    options = {"texts": TEXTS, "vocab_size": 300, "path": "a.model"} | options
    path = tmp_path / "sub" / options.pop("path")
    with pytest.raises(ValueError, match=message):
        train_tokenizer(path, **options)
    assert not list(tmp_path.iterdir())


def test_what_a_puzzle_vocabulary_refuses(tmp_path):
    with pytest.raises(ValueError, match="9 to 99999, not 8"):
        train_puzzle_tokenizer(tmp_path / "a.model", 8)
    with pytest.raises(ValueError, match="' 12' is taken"):
        train_puzzle_tokenizer(tmp_path / "a.model", symbols=[" 12"])
    (tmp_path / "b.model").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        train_puzzle_tokenizer(tmp_path / "b.model")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.model"
    train_puzzle_tokenizer(path, 9)
    old = path.read_bytes()

    def fail(fd):
        raise OSError("no space left")

    monkeypatch.setattr("rlm_jax.text.train_tokenizer.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        train_puzzle_tokenizer(path, 10)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_without_sentencepiece_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install 'rlm_jax\[text\]'"):
        train_puzzle_tokenizer(tmp_path / "a.model")
    assert not list(tmp_path.iterdir())
