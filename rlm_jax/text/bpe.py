"""BPE tokenizers on the `tokenizers` package, from tokenizer.json or from a GGUF file.

The one idea: whatever the source, the tokenizer is described by one HF tokenizer.json. A GGUF
file holds the same description in other words (`gguf_vocab.py` translates), so both paths share
every line below, and the ids equal those of the tokenizer that the model was trained with.

Deviation from `tokenizers`: `decode` joins exact bytes instead of running the file's decoder. The
text is the same, except that a malformed UTF-8 run may count its U+FFFD marks differently.
"""

import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlm_jax.text.gguf_vocab import (
    MAX_PIECE_CHARS,
    adds_bos,
    end_of_generation_ids,
    tokenizer_json_from_gguf,
    unused_ids,
)
from rlm_jax.text.tokenizer import (
    SPACE_MARK,
    bos_prefix,
    id_list,
    join_token_bytes,
    read_chat_template,
    read_end_ids,
    read_json,
    utf8_bytes,
)

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_GAP = 65_536  # More ids than a vocabulary has tokens, beyond twice as many.


class BPETokenizer:
    """A tokenizer described by the text of an HF tokenizer.json (see `text.tokenizer.Tokenizer`).

    Args:
        description: the JSON text.
        bos_id, eos_ids, adds_bos, chat_template: what the JSON does not say.
        unused: ids that exist but stand for nothing (padding of the vocabulary).

    Raises:
        ValueError: malformed JSON, a decoder that is neither byte-level nor SentencePiece-like,
            ids outside the vocabulary, or the tokenizers package is not installed.
    """

    def __init__(
        self,
        description: str,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        adds_bos: bool = False,
        chat_template: str | None = None,
        unused: Sequence[int] = (),
    ):
        self._description = description
        # Special tokens in ordinary text are text to this one; `_parsing` knows them.
        self._plain = _build(description)
        self._plain.encode_special_tokens = True
        vocab = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        # Ids have gaps, but not without bound: all of them take memory.
        if self.vocab_size > 2 * len(vocab) + _MAX_GAP:
            raise ValueError(
                f"token id {self.vocab_size - 1} in a vocabulary of {len(vocab)} tokens"
            )
        longest = max(map(len, vocab), default=0)
        if longest > MAX_PIECE_CHARS:
            raise ValueError(f"a token of {longest} characters: accepted are {MAX_PIECE_CHARS}")
        added = self._plain.get_added_tokens_decoder()
        self._special_text = {i: t.content for i, t in sorted(added.items()) if t.special}
        self.special_tokens: Mapping[str, int] = {text: i for i, text in self._special_text.items()}
        kind, self._adds_space = _read_decoder(json.loads(description))
        self._pieces = [b""] * self.vocab_size
        for text, i in vocab.items():
            if i not in self._special_text:
                self._pieces[i] = _piece_bytes(text, kind, is_added=i in added)
        for i in unused:
            self._pieces[i] = b""
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.adds_bos = adds_bos
        self.chat_template = chat_template
        for i in (*self.eos_ids, *([] if bos_id is None else [bos_id])):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"control token {i} is outside the {self.vocab_size} token ids")

    @functools.cached_property
    def _parsing(self):
        return _build(self._description)

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        utf8_bytes(text)
        ids = bos_prefix(self.bos_id, add_bos)
        if allow_special:
            return ids + _encode(self._parsing, text).ids
        return ids + self._encode_plain(text)

    def _encode_plain(self, text: str) -> list[int]:
        encoding = _encode(self._plain, text)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # A vocabulary may spell a control token out of ordinary pieces: keep those apart.
            if end - start > 1 and token in self._special_text:
                cut = start + 1
                return self._encode_plain(text[:cut]) + self._encode_plain(text[cut:])
        return encoding.ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        shown = {} if skip_special else self._special_text
        text = join_token_bytes(ids, self._pieces, shown).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def token_bytes(self, token: int) -> bytes:
        return join_token_bytes([token], self._pieces, {})

    def is_special(self, token: int) -> bool:
        return token >= self.vocab_size or not self._pieces[token]


def _build(description: str):
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "BPE tokenizers need the tokenizers package: pip install 'rlm_jax[text]'"
        ) from error
    with _as_value_error("not a tokenizer.json that tokenizers can read"):
        tokenizer = tokenizers.Tokenizer.from_str(description)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encode(tokenizer, text: str):
    with _as_value_error("a text that this tokenizer cannot read"):
        return tokenizer.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """The Rust side raises plain Exception, and what is no Exception where it panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


@functools.cache
def byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's alphabet).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in sorted(printable)}
    return table | {chr(0x100 + i): b for i, b in enumerate(others)}


def _piece_bytes(text: str, kind: str, is_added: bool) -> bytes:
    """What a vocabulary entry stands for; added tokens are written in plain text."""
    if kind == "byte_level":
        table = byte_of_char()
        try:
            return text.encode() if is_added else bytes([table[c] for c in text])
        except KeyError:
            return text.encode()
    byte = BYTE_TOKEN.fullmatch(text)
    if byte and not is_added:
        return bytes([int(byte[1], 16)])
    return text.replace(SPACE_MARK, " ").encode()


def _read_decoder(description: dict[str, Any]) -> tuple[str, bool]:
    """("byte_level" or "sentencepiece", whether decoding takes one leading space off)."""
    decoder = description.get("decoder") or {}
    stages = {d.get("type"): d for d in decoder.get("decoders", [decoder])}
    if "ByteLevel" in stages:
        return "byte_level", False
    if "Metaspace" in stages:
        scheme = stages["Metaspace"].get("prepend_scheme")
        return "sentencepiece", scheme != "never"
    if "ByteFallback" in stages or "Replace" in stages:
        return "sentencepiece", stages.get("Strip", {}).get("start", 0) > 0
    raise ValueError(
        f"tokenizer.json has decoder {', '.join(map(str, stages))}; accepted: ByteLevel, "
        "Metaspace, or Replace with ByteFallback"
    )


def load_tokenizer_json(path: str | pathlib.Path) -> BPETokenizer:
    """Reads tokenizer.json, and what the files beside it say about bos, eos and the template.

    eos_ids are the eos_token of tokenizer_config.json or special_tokens_map.json, then those of
    generation_config.json, then config.json's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one of the files is malformed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    folder = path.parent
    description = read_json(path)
    config = read_json(folder / "special_tokens_map.json")
    config |= {k: v for k, v in read_json(folder / "tokenizer_config.json").items() if v}
    generation = read_json(folder / "generation_config.json")
    try:
        ids = {t["content"]: t["id"] for t in description.get("added_tokens") or []}
        eos = [
            *_named_id(config.get("eos_token"), ids),
            *read_end_ids(folder),
        ]
        bos = [*_named_id(config.get("bos_token"), ids), *id_list(generation.get("bos_token_id"))]
        return BPETokenizer(
            path.read_text(encoding="utf-8"),
            bos_id=bos[0] if bos else None,
            eos_ids=eos,
            adds_bos=bool(config.get("add_bos_token", _adds_bos(description, bos))),
            chat_template=read_chat_template(folder),
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from error


def _named_id(token: Any, ids: Mapping[str, int]) -> list[int]:
    """A token given as text, or as {"content": text}, looked up among the added tokens."""
    text = token.get("content") if isinstance(token, dict) else token
    return [ids[text]] if isinstance(text, str) and text in ids else []


def _adds_bos(description: dict[str, Any], bos: list[int]) -> bool:
    """Whether the template post-processor puts the bos token before a text."""
    processor = description.get("post_processor") or {}
    for stage in processor.get("processors", [processor]):
        single = stage.get("single") or []
        first = single[0].get("SpecialToken") if single else None
        tokens = stage.get("special_tokens") or {}
        if first and bos and bos[0] in tokens[first["id"]].get("ids", []):
            return True
    return False


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> BPETokenizer:
    """Rebuilds the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's key-value pairs as plain Python values.

    Raises:
        ValueError: a key is missing or malformed, or names a kind of tokenizer that is not
            supported.
    """
    description = tokenizer_json_from_gguf(metadata)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer.chat_template is not a string: {template!r:.80}")
    return BPETokenizer(
        description,
        bos_id=None if bos is None else int(bos),
        eos_ids=end_of_generation_ids(metadata),
        adds_bos=adds_bos(metadata),
        chat_template=template,
        unused=unused_ids(metadata),
    )
