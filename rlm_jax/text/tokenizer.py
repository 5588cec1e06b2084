"""Tokenizers behind one protocol: text to token ids and back.

The one idea: control tokens (end of turn, beginning of text) are never spelled by ordinary text.
A user's question that contains `<|im_end|>` is encoded as the characters it is made of, unless
the caller says `allow_special=True` because the text is its own.

`decode` joins the exact bytes that each token contributes (`token_bytes`), so a character whose
bytes lie in several tokens comes out whole, and malformed bytes come out as U+FFFD.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

SPACE_MARK = "▁"  # U+2581, how SentencePiece writes a space
# What a model folder may hold of its tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer.

    Attributes:
        vocab_size: number of token ids, 0 to vocab_size - 1.
        bos_id: beginning-of-text token, if there is one.
        eos_ids: tokens that end a solution (end of text, end of turn); the first is the one that
            a chat template means by `eos_token`.
        adds_bos: whether the model was trained with `bos_id` before every text.
        chat_template: the file's own jinja2 chat template.
        special_tokens: text to id of the control tokens.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None
    special_tokens: Mapping[str, int]

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; control tokens are recognised only with `allow_special`.

        Raises:
            ValueError: `text` holds half a surrogate pair, or there is no bos token to add.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; ids past the vocabulary (padding rows of an embedding) are empty."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that the token contributes; b"" for control tokens."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether the token contributes no text (control, unknown or unused)."""
        ...


def join_token_bytes(
    ids: Iterable[int], pieces: Sequence[bytes], special_text: Mapping[int, str]
) -> bytes:
    """Bytes of a token sequence; control tokens appear as the text in `special_text`."""
    parts = []
    for token in ids:
        if token < 0:
            raise ValueError(f"token id {token} is negative")
        if token in special_text:
            parts.append(special_text[token].encode())
        elif token < len(pieces):
            parts.append(pieces[token])
    return b"".join(parts)


def split_special(text: str, special_tokens: Mapping[str, int]) -> list[str | int]:
    """Cuts `text` at control tokens: strings of plain text, and ids in their places."""
    if not special_tokens:
        return [text] if text else []
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
    parts = re.split(pattern, text)
    return [special_tokens[p] if i % 2 else p for i, p in enumerate(parts) if i % 2 or p]


def bos_prefix(bos_id: int | None, add_bos: bool) -> list[int]:
    """The ids to put before a text: `[bos_id]` when asked for, else nothing."""
    if not add_bos:
        return []
    if bos_id is None:
        raise ValueError("add_bos=True, but this tokenizer has no beginning-of-text token")
    return [bos_id]


def utf8_bytes(text: str) -> bytes:
    """UTF-8 of a text; ValueError when it holds half a surrogate pair, which JSON can spell."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half a surrogate pair") from error


class ByteTokenizer:
    """One token a byte (ids 0-255), then `<bos>`, `<eos>` and `<eois>` (end of a step)."""

    vocab_size = 259
    bos_id = 256
    eos_ids = (257,)
    end_of_step_id = 258
    adds_bos = False
    chat_template = None

    def __init__(self):
        self.special_tokens: Mapping[str, int] = {"<bos>": 256, "<eos>": 257, "<eois>": 258}
        self._special_text = {i: text for text, i in self.special_tokens.items()}
        self._pieces = [bytes([i]) for i in range(256)] + [b""] * 3

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        parts = split_special(text, self.special_tokens) if allow_special else [text]
        ids = bos_prefix(self.bos_id, add_bos)
        for part in parts:
            ids += [part] if isinstance(part, int) else list(utf8_bytes(part))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        shown = {} if skip_special else self._special_text
        return join_token_bytes(ids, self._pieces, shown).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return join_token_bytes([token], self._pieces, {})

    def is_special(self, token: int) -> bool:
        return token >= 256


class SentencePieceTokenizer:
    """A SentencePiece `.model` file, read by the sentencepiece package.

    The model's own normalizer applies (so `decode(encode(text))` is the normalized text), and the
    space that it puts before a text is taken off again by `decode`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece model, or sentencepiece is not installed.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        processor = self._processor = _read_sentencepiece(pathlib.Path(path))
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        own = (processor.eos_id(),) if processor.eos_id() >= 0 else ()
        self.eos_ids = tuple(dict.fromkeys((*own, *eos_ids)))
        for i in self.eos_ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"{path}: end token {i} is outside {self.vocab_size} token ids")
        self.adds_bos = self.bos_id is not None
        self.chat_template = chat_template
        ids = range(self.vocab_size)
        self._pieces = [_sentencepiece_bytes(processor, i) for i in ids]
        control = [i for i in ids if processor.is_control(i) or i in self.eos_ids]
        self.special_tokens: Mapping[str, int] = {processor.id_to_piece(i): i for i in control}
        self._special_text = {i: processor.id_to_piece(i) for i in control}
        self._silent = frozenset(i for i in ids if i in self._special_text or not self._pieces[i])
        first = processor.encode("a", out_type=str)[:1]
        self._adds_space = bool(first) and first[0].startswith(SPACE_MARK)

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        utf8_bytes(text)
        parts = split_special(text, self.special_tokens) if allow_special else [text]
        ids = bos_prefix(self.bos_id, add_bos)
        for part in parts:
            ids += [part] if isinstance(part, int) else self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        shown = {} if skip_special else self._special_text
        text = join_token_bytes(ids, self._pieces, shown).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def token_bytes(self, token: int) -> bytes:
        return join_token_bytes([token], self._pieces, {})

    def is_special(self, token: int) -> bool:
        return token >= self.vocab_size or token in self._silent


def _read_sentencepiece(path: pathlib.Path):
    if not path.is_file():
        raise FileNotFoundError(f"no SentencePiece model at {path}")
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs sentencepiece: pip install 'rlm_jax[text]'"
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error


def _sentencepiece_bytes(processor, token: int) -> bytes:
    if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
        return b""
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def load_tokenizer(source: str | pathlib.Path | Mapping[str, Any]) -> Tokenizer:
    """Reads the tokenizer of a checkpoint.

    Args:
        source: a folder with tokenizer.json or tokenizer.model, the path of either file, or the
            metadata of a GGUF file as a plain dict.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds neither file.
        ValueError: the file is malformed, or describes a tokenizer that is not supported.
    """
    from rlm_jax.text import bpe

    if isinstance(source, Mapping):
        return bpe.tokenizer_from_gguf(source)
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise FileNotFoundError(f"{path} holds neither tokenizer.json nor tokenizer.model")
    if path.suffix == ".json":
        return bpe.load_tokenizer_json(path)
    if path.suffix == ".model":
        template = read_chat_template(path.parent)
        return SentencePieceTokenizer(
            path, eos_ids=read_end_ids(path.parent), chat_template=template
        )
    raise ValueError(f"{path}: expected tokenizer.json, tokenizer.model or a folder with one")


def read_end_ids(folder: pathlib.Path) -> list[int]:
    """The tokens that end a text by generation_config.json, then config.json, beside a model."""
    files = [read_json(folder / name) for name in ("generation_config.json", "config.json")]
    return [i for file in files for i in id_list(file.get("eos_token_id"))]


def id_list(value: Any) -> list[int]:
    """The ids in what a file of a checkpoint names: one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int)]


def read_chat_template(folder: pathlib.Path) -> str | None:
    """The chat template beside a tokenizer: chat_template.jinja, else tokenizer_config.json's.

    Of several named templates in tokenizer_config.json it takes `default`, else the first.
    """
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return template


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; {} when there is no file; ValueError when it is not one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
