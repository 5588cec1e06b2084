"""Tokenizers: SmolLM2 against goldens, rebuilt vocabularies against the originals."""

import hashlib
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.models.gguf_file import read_gguf_metadata
from rlm_jax.text.bpe import BPETokenizer, load_tokenizer_json, tokenizer_from_gguf
from rlm_jax.text.gguf_vocab import tokenizer_json_from_gguf
from rlm_jax.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer

# As published with the models, not as the package writes them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CONTROL_TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

WILD = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SNIPPETS = ("the", "The", " a", "  ", "\n", "\n\n", "\t", "12", "3456", "'s", "'LL", "don't")
SNIPPETS += (
    "é",
    "好",
    "🙂",
    "def f(x):",
    " return",
    "_",
    "<|",
    "im_end",
    "|>",
    "▁",
    "e\u0301",
    ".",
)
TEXTISH = st.lists(st.sampled_from(SNIPPETS), max_size=14).map("".join)
TEXTS = WILD | TEXTISH


@pytest.fixture(scope="session")
def corpus(root):
    """Text to train small vocabularies on: this repository's own sources."""
    files = sorted(root.glob("rlm_jax/**/*.py")) + sorted(root.glob("tests/**/*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


def train_byte_level(corpus, pre_tokenizer, normalizer=None, **model_options):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**model_options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(CONTROL_TEXTS)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def gguf_metadata(original, pre):
    """What llama.cpp's converter writes for a byte-level tokenizer."""
    description = json.loads(original.to_str())
    vocab = original.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    kinds = {t.content: 3 if t.special else 4 for t in original.get_added_tokens_decoder().values()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([kinds.get(t, 1) for t in tokens], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
    }


@pytest.fixture(scope="session")
def byte_level_pairs(corpus):
    """Original tokenizer and metadata, by the name of the pre-tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    def split(pattern):
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    smollm = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    originals = {
        "llama-bpe": train_byte_level(corpus, split(LLAMA3_PATTERN), ignore_merges=True),
        "qwen2": train_byte_level(corpus, split(QWEN2_PATTERN), normalizers.NFC()),
        "gpt-2": train_byte_level(corpus, gpt2),
        "smollm": train_byte_level(corpus, smollm),
    }
    return {pre: (o, tokenizer_from_gguf(gguf_metadata(o, pre))) for pre, o in originals.items()}


BYTE_LEVEL = ["llama-bpe", "qwen2", "gpt-2", "smollm"]


def digest(ids):
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:12]


def test_smollm2_ids_equal_the_goldens(smollm2, golden):
    digests = golden["sha256_of_ids"].split()
    assert len(golden["strings"]) == len(digests) >= 200
    for i, ids in golden["ids"].items():
        assert smollm2.encode(golden["strings"][int(i)]) == ids
    for i, (text, expected) in enumerate(zip(golden["strings"], digests, strict=True)):
        ids = smollm2.encode(text)
        assert digest(ids) == expected, text
        assert smollm2.encode(text, allow_special=True) == golden["special"].get(str(i), ids)
        assert smollm2.decode(ids) == text


def test_smollm2_knows_its_control_tokens(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_id == 1
    assert smollm2.eos_ids == (2, 0)
    assert not smollm2.adds_bos
    assert smollm2.encode("a", add_bos=True)[0] == 1
    assert smollm2.is_special(2)
    assert smollm2.token_bytes(2) == b""
    assert smollm2.decode([2, 57], skip_special=True) == "I"
    assert smollm2.decode([2, 57]) == "<|im_end|>I"


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@settings(max_examples=120, deadline=None)
@given(text=TEXTS)
def test_rebuilt_byte_level_ids_equal_the_original(byte_level_pairs, pre, text):
    original, rebuilt = byte_level_pairs[pre]
    ids = original.encode(text, add_special_tokens=False).ids
    assert rebuilt.encode(text, allow_special=True) == ids
    normal = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert rebuilt.decode(rebuilt.encode(text)) == normal
    assert rebuilt.decode(ids) == original.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from([*CONTROL_TEXTS, "<|im_", "end|>", "a", " "]), max_size=6))
def test_text_never_spells_a_control_token(byte_level_pairs, pre, parts):
    _, rebuilt = byte_level_pairs[pre]
    text = "".join(parts)
    ids = rebuilt.encode(text)
    assert not any(rebuilt.is_special(i) for i in ids)
    assert rebuilt.decode(ids, skip_special=True) == text
    control = [i for i in rebuilt.encode(text, allow_special=True) if rebuilt.is_special(i)]
    assert len(control) == sum(text.count(c) for c in CONTROL_TEXTS)


def test_whole_words_of_llama3_cannot_be_control_tokens(byte_level_pairs):
    """`ignore_merges` takes whole words from the vocabulary: a control token must not be one."""
    original, _ = byte_level_pairs["llama-bpe"]
    metadata = gguf_metadata(original, "llama-bpe")
    stop = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "STOP"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3]
    rebuilt = tokenizer_from_gguf(metadata)
    assert stop in rebuilt.encode("STOP", allow_special=True)
    ids = rebuilt.encode("go STOP STOP")
    assert stop not in ids
    assert rebuilt.decode(ids) == "go STOP STOP"


@pytest.mark.parametrize("kind", [1, 4])
def test_what_ends_a_turn_is_a_control_token_whatever_its_type(byte_level_pairs, kind):
    """Published files call some of them normal or a user's own, and llama.cpp overrides that."""
    original, rebuilt = byte_level_pairs["smollm"]
    metadata = gguf_metadata(original, "smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.eos_token_id"] = tokens.index("<|endoftext|>")
    for text in ("<|im_end|>", "<|im_start|>"):
        metadata["tokenizer.ggml.token_type"][tokens.index(text)] = kind
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokens.index("<|im_end|>") in tokenizer.eos_ids
    text = "<|im_start|>a<|im_end|>"
    assert tokenizer.encode(text) == rebuilt.encode(text)
    assert tokenizer.encode(text, allow_special=True) == rebuilt.encode(text, allow_special=True)


@pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("qwen2", False)])
def test_llama3_begins_a_text_where_its_file_does_not_say_so(byte_level_pairs, pre, adds):
    """As llama.cpp does; what is converted says so."""
    original, tokenizer = byte_level_pairs[pre]
    assert tokenizer.adds_bos is adds
    description = json.loads(tokenizer_json_from_gguf(gguf_metadata(original, pre)))
    assert (description["post_processor"] is not None) is adds
    silent = gguf_metadata(original, pre) | {"tokenizer.ggml.add_bos_token": False}
    assert not tokenizer_from_gguf(silent).adds_bos


def test_padding_of_the_vocabulary_stands_for_nothing(byte_level_pairs):
    original, _ = byte_level_pairs["qwen2"]
    metadata = gguf_metadata(original, "qwen2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "[PAD7]"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 5]
    rebuilt = tokenizer_from_gguf(metadata)
    pad = rebuilt.vocab_size - 1
    assert rebuilt.is_special(pad)
    assert rebuilt.token_bytes(pad) == b""
    assert rebuilt.decode([pad, pad + 1000]) == ""
    assert pad not in rebuilt.encode("[PAD7]", allow_special=True)


# SentencePiece


def train_sentencepiece(folder, corpus, **options):
    import sentencepiece

    lines = [line for text in corpus for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


def sentencepiece_metadata(path, *, adds_space):
    """What llama.cpp's converter writes for a SentencePiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())

    def kind(i):
        tests = (
            (model.is_unknown, 2),
            (model.is_control, 3),
            (model.is_unused, 5),
            (model.is_byte, 6),
        )
        user_defined = 4 if model.id_to_piece(i) in USER_DEFINED else 1
        return next((number for test, number in tests if test(i)), user_defined)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


USER_DEFINED = ["\n", "\n\n", "▁▁", "▁▁▁▁", "<table>"]
LLAMA = {"vocab_size": 1200}
GEMMA = {
    "vocab_size": 1200,
    "add_dummy_prefix": False,
    "split_digits": True,
    "user_defined_symbols": USER_DEFINED,
    "allow_whitespace_only_pieces": True,
}


@pytest.fixture(scope="session", params=[LLAMA, GEMMA], ids=["llama", "gemma"])
def sentencepiece_pair(request, corpus, tmp_path_factory):
    """A SentencePiece model read by its own package, and rebuilt from GGUF metadata."""
    path = train_sentencepiece(tmp_path_factory.mktemp("spm"), corpus, **request.param)
    adds_space = request.param is LLAMA
    metadata = sentencepiece_metadata(path, adds_space=adds_space)
    return SentencePieceTokenizer(path), tokenizer_from_gguf(metadata)


@settings(max_examples=250, deadline=None)
@given(text=TEXTS)
def test_rebuilt_sentencepiece_ids_equal_the_original(sentencepiece_pair, text):
    original, rebuilt = sentencepiece_pair
    text = text.replace("▁", "_")  # the mark itself cannot be told from a space
    ids = original.encode(text)
    assert rebuilt.encode(text) == ids
    assert original.decode(ids) == rebuilt.decode(ids) == text
    assert b"".join(map(original.token_bytes, ids)) == b"".join(map(rebuilt.token_bytes, ids))


def test_sentencepiece_control_tokens(sentencepiece_pair):
    for tokenizer in sentencepiece_pair:
        assert tokenizer.special_tokens["</s>"] == 2
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
        assert not any(map(tokenizer.is_special, tokenizer.encode("<s>hi</s><unk>")))
        ids = tokenizer.encode("<s>hi</s>", allow_special=True)
        assert [i for i in ids if tokenizer.is_special(i)] == [1, 2]
        assert tokenizer.decode(ids, skip_special=True).strip() == "hi"


def test_a_folder_says_what_else_ends_a_text(corpus, tmp_path):
    """Chat models of SentencePiece end a turn by a piece that its own file knows nothing of."""
    folder = (
        train_sentencepiece(tmp_path, corpus, **LLAMA).rename(tmp_path / "tokenizer.model").parent
    )
    plain = load_tokenizer(folder / "tokenizer.model")
    end = plain.vocab_size - 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (2, end)
    assert tokenizer.is_special(end)
    assert not plain.is_special(end)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 10**6}))
    with pytest.raises(ValueError, match="end token 1000000 is outside"):
        load_tokenizer(folder)


# Files


def test_tokenizer_json_of_a_folder(smollm2_gguf, smollm2, tmp_path):
    metadata = read_gguf_metadata(smollm2_gguf)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json_from_gguf(metadata), encoding="utf-8")
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "A"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_ids, loaded.chat_template) == (1, (2, 0), "A")
    assert loaded.special_tokens == smollm2.special_tokens
    text = "12 don't\n\n  <|im_end|> 🙂"
    assert loaded.encode(text) == smollm2.encode(text)
    (tmp_path / "chat_template.jinja").write_text("B")
    assert load_tokenizer(tmp_path / "tokenizer.json").chat_template == "B"


def test_bos_of_the_post_processor(byte_level_pairs, tmp_path):
    original, _ = byte_level_pairs["gpt-2"]
    metadata = gguf_metadata(original, "gpt-2") | {"tokenizer.ggml.add_bos_token": True}
    (tmp_path / "tokenizer.json").write_text(tokenizer_json_from_gguf(metadata), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|endoftext|>"}')
    loaded = load_tokenizer_json(tmp_path / "tokenizer.json")
    assert loaded.adds_bos
    assert loaded.bos_id == metadata["tokenizer.ggml.bos_token_id"]
    assert loaded.encode("a") == original.encode("a").ids


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_byte_tokenizer_round_trip(text, special):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text, add_bos=True, allow_special=special)
    assert tokenizer.decode(ids, skip_special=True) == text
    assert all(i < 256 for i in tokenizer.encode("<eos><bos>"))
    assert tokenizer.encode("a<eois>", allow_special=True) == [97, tokenizer.end_of_step_id]
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"


# Errors

SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
}
SPM = {**SMALL, "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, -1.0, -2.0]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model is None; accepted: 'gpt2', 'llama'"),
        ({**SMALL, "tokenizer.ggml.model": "rwkv"}, "'rwkv'; accepted"),
        ({**SMALL, "tokenizer.ggml.pre": "tekken"}, "'tekken'; accepted: smollm, llama-bpe"),
        ({**SMALL, "tokenizer.ggml.tokens": None}, "tokens must be a list of strings"),
        ({**SMALL, "tokenizer.ggml.tokens": [1, 2]}, "tokens must be a list of strings"),
        ({**SMALL, "tokenizer.ggml.tokens": ["a", "b", "a"]}, "'a' twice"),
        ({**SMALL, "tokenizer.ggml.merges": ["ab"]}, "'ab'; expected two tokens"),
        ({**SMALL, "tokenizer.ggml.merges": ["a c"]}, "not a tokenizer.json"),
        ({**SMALL, "tokenizer.ggml.token_type": [1]}, r"1 token types for 3 tokens"),
        ({**SMALL, "tokenizer.ggml.token_type": 1}, "token_type must be a list of numbers"),
        ({**SMALL, "tokenizer.ggml.tokens": 3}, "tokens must be a list of strings"),
        ({**SMALL, "tokenizer.ggml.tokens": ["a", "b", "a" * 9000]}, "9000 characters: too long"),
        ({**SPM, "tokenizer.ggml.scores": 1.0}, "scores must be a list of numbers"),
        ({**SMALL, "tokenizer.ggml.eos_token_id": 3}, "eos_token_id 3 is outside 3 tokens"),
        ({**SMALL, "tokenizer.chat_template": 5}, "chat_template"),
        ({**SPM, "tokenizer.ggml.scores": [0.0]}, "one score per token"),
    ],
)
def test_bad_gguf_metadata_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(metadata)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor"):
        load_tokenizer(tmp_path)
    for content in ("", "{", "[]", "{}", '{"model": 1}', '{"added_tokens": 3}', "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)
    hostile = json.loads(tokenizer_json_from_gguf(SMALL))
    ids = {**hostile["model"]["vocab"], "z": 4_000_000_000}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    for change, message in (
        ({"model": {**hostile["model"], "vocab": ids}}, "token id 4000000000 in a vocabulary of 4"),
        ({"normalizer": charsmap}, r"tokenizer\.json"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**hostile, **change}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"expected tokenizer\.json"):
        load_tokenizer(__file__)


def test_other_misuse_is_refused(tmp_path):
    word_level = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    description = {"version": "1.0", "model": word_level, "added_tokens": []}
    with pytest.raises(ValueError, match="decoder None; accepted: ByteLevel"):
        BPETokenizer(json.dumps(description))
    with pytest.raises(ValueError, match="no beginning-of-text token"):
        tokenizer_from_gguf(SMALL).encode("a", add_bos=True)
    for tokenizer in (tokenizer_from_gguf(SMALL), tokenizer_from_gguf(SPM), ByteTokenizer()):
        with pytest.raises(ValueError, match="character 1 of the text is half a surrogate pair"):
            tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="negative"):
        ByteTokenizer().decode([-1])
