"""A tokenizer whose vocabulary is any list of byte strings, for tests of tables over tokens."""


class PieceTokenizer:
    """Encodes nothing; `eos` are its control tokens."""

    bos_id = None
    adds_bos = False
    chat_template = None

    def __init__(self, pieces: list[bytes], eos: tuple[int, ...] = ()):
        self.pieces = pieces
        self.vocab_size = len(pieces)
        self.eos_ids = eos
        self.special_tokens = {f"<{i}>": i for i in eos}

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False):
        raise NotImplementedError

    def decode(self, ids, *, skip_special: bool = False) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return b"" if token in self.eos_ids else self.pieces[token]

    def is_special(self, token: int) -> bool:
        return token in self.eos_ids
