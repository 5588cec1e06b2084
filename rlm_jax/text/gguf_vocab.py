"""The vocabulary of a GGUF file as an HF tokenizer.json.

GGUF keeps the tokens, their types, the merges or scores, and the *name* of the pre-tokenizer
(`tokenizer.ggml.pre`), not its definition; the definitions are below. Two families:

- model "gpt2": byte-level BPE. smollm splits digits one by one, then by GPT-2's pattern;
  llama-bpe and qwen2 have their published patterns; qwen2 normalizes to NFC.
- model "llama": SentencePiece BPE (Llama 2, Gemma). The file keeps scores instead of merges: two
  neighbouring pieces merge when their concatenation is a piece, higher scores first. Bytes that
  no piece covers fall back to the 256 byte tokens.

Deviation from llama.cpp: its "default" pre-tokenizer is GPT-2's here, as in the models that carry
the name, and qwen2 text is normalized to NFC, as the original tokenizer does.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlm_jax.text.tokenizer import SPACE_MARK

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = "llama-bpe"
_SPLIT_PATTERNS = {
    _LLAMA_3: rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
_SAME_AS = {"llama3": _LLAMA_3, "llama-v3": _LLAMA_3, "default": "gpt-2"}
PRE_TOKENIZERS = ("smollm", "llama-bpe", "llama3", "llama-v3", "qwen2", "gpt-2", "default")

# Control tokens that end a turn or a text: chat models have two, a GGUF file names one.
_END_TEXTS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
)
# These and the ones above are control tokens, whatever a file says their type is.
_START_TEXTS = ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>")
MAX_PIECE_CHARS = 4096


def tokenizer_json_from_gguf(metadata: Mapping[str, Any]) -> str:
    """A valid HF tokenizer.json with the ids of the GGUF file.

    Raises:
        ValueError: a key is missing or malformed, or the tokenizer model or pre-tokenizer is not
            one of those accepted (named in the message).
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {model!r}; accepted: 'gpt2', 'llama'")
    tokens = _string_list(metadata, "tokenizer.ggml.tokens")
    types = _token_types(metadata, tokens)
    build = _byte_level_parts if model == "gpt2" else _sentencepiece_parts
    parts = build(metadata, tokens, types)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(tokens, types),
            "normalizer": parts["normalizer"],
            "pre_tokenizer": parts["pre_tokenizer"],
            "post_processor": _post_processor(metadata, tokens),
            "decoder": parts["decoder"],
            "model": parts["model"],
        },
        ensure_ascii=False,
    )


def _byte_level_parts(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; accepted: {', '.join(PRE_TOKENIZERS)}")
    name = _SAME_AS.get(name, name)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name in _SPLIT_PATTERNS:
        pattern = {"Regex": _SPLIT_PATTERNS[name]}
        first = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    elif name == "smollm":
        first = [{"type": "Digits", "individual_digits": True}]
    else:
        first = []
    last = byte_level | {"use_regex": name not in _SPLIT_PATTERNS}
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, last]},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(metadata),
            "ignore_merges": name == _LLAMA_3,
        },
    }


def _merges(metadata: Mapping[str, Any]) -> list[str]:
    merges = _string_list(metadata, "tokenizer.ggml.merges")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left and right) or " " in right:
            raise ValueError(f"tokenizer.ggml.merges holds {merge!r}; expected two tokens")
    return merges


def _sentencepiece_parts(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    scores = _number_list(metadata, "tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores must hold one score per token")
    scores = [float(score) for score in scores]
    adds_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = [{"type": "Prepend", "prepend": SPACE_MARK}] if adds_space else []
    unmark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    fallback = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, mark]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [unmark, *fallback, *strip]},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges_from_scores(tokens, types, scores),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": BYTE in types,
        },
    }


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best score of the whole first.

    Splits of one piece have one score; they are ordered by the ids of their halves, as HF does.
    """
    mergeable = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    ranked = []
    for token, i in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[i], mergeable[left], mergeable[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    def describe(i: int, special: bool) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        # A piece that holds the space mark can only match text that has been normalized.
        normalized = not special and SPACE_MARK in tokens[i]
        return {"id": i, "content": tokens[i], **flags} | {
            "normalized": normalized,
            "special": special,
        }

    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    return [describe(i, kinds[kind]) for i, kind in enumerate(types) if kind in kinds]


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with the bos token; files that do not say so follow their kind."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    default = metadata.get("tokenizer.ggml.model") == "llama" or _SAME_AS.get(pre, pre) == _LLAMA_3
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _post_processor(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any] | None:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is None or not adds_bos(metadata):
        return None
    text = tokens[bos]
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, sequences[0]],
        "pair": [first, *sequences],
        "special_tokens": {text: {"id": text, "ids": [int(bos)], "tokens": [text]}},
    }


def _string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{key} must be a list of strings")
    longest = max(map(len, value), default=0)
    if longest > 2 * MAX_PIECE_CHARS:
        raise ValueError(f"{key} holds a string of {longest} characters: too long for a token")
    return list(value)


def _number_list(metadata: Mapping[str, Any], key: str) -> list[Any] | None:
    """A list of numbers, None where there is none."""
    value = metadata.get(key)
    if value is None:
        return None
    if np.ndim(value) != 1 or np.asarray(value).dtype.kind not in "iuf":
        raise ValueError(f"{key} must be a list of numbers")
    return np.asarray(value).tolist()


def _token_types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """The type of every token; control tokens named by id are CONTROL in any case.

    Raises:
        ValueError: a token occurs twice, the list has another length, or an id is out of range.
    """
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))
        raise ValueError(f"tokenizer.ggml.tokens holds {twice!r} twice")
    types = _number_list(metadata, "tokenizer.ggml.token_type")
    types = [NORMAL] * len(tokens) if types is None else list(map(int, types))
    if len(types) != len(tokens):
        raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
    for role in ("bos", "eos", "eot", "eom"):
        i = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if i is None:
            continue
        if not 0 <= i < len(tokens):
            raise ValueError(f"tokenizer.ggml.{role}_token_id {i} is outside {len(tokens)} tokens")
        types[i] = CONTROL
    turns = {*_END_TEXTS, *_START_TEXTS}
    return [CONTROL if token in turns else t for token, t in zip(tokens, types, strict=True)]


def end_of_generation_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Tokens that end a solution: those the file names, then control tokens known to end turns."""
    named = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    tokens = metadata["tokenizer.ggml.tokens"]
    types = _token_types(metadata, tokens)
    ids = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    return [int(i) for i in named if i is not None] + [ids[t] for t in _END_TEXTS if t in ids]


def unused_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that stand for nothing: padding that rounds the vocabulary up."""
    types = _number_list(metadata, "tokenizer.ggml.token_type")
    return [i for i, kind in enumerate(types or []) if int(kind) == UNUSED]
