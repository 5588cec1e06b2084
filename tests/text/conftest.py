"""The SmolLM2 tokenizer and its goldens."""

import json

import pytest

from rlm_jax.models.gguf_file import read_gguf_metadata
from rlm_jax.text.bpe import tokenizer_from_gguf


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    return tokenizer_from_gguf(read_gguf_metadata(smollm2_gguf))


@pytest.fixture(scope="session")
def golden(root):
    return json.loads((root / "tests/golden/tokens_smollm2.json").read_text(encoding="utf-8"))
