"""A trained policy as a model folder: what the rest of the package loads, and transformers too.

Weights go out as safetensors under Hugging Face names with config.json, the tokenizer's own files
beside them and the value head in a file of its own. What made the model (command, seed, data,
figures) stands in config.json under "rlm_jax", so that `load_model(folder).metadata["rlm_jax"]`
gives it back.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlm_jax.models.checkpoint import described_shapes, float_dtype
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import ValueHead, save_value_head
from rlm_jax.models.hf import CONFIG, new_model_folder, write_hf, write_json
from rlm_jax.models.params import Params, name_leaves
from rlm_jax.models.state_value import StateValue, save_state_value
from rlm_jax.text.tokenizer import TOKENIZER_FILES, load_tokenizer, read_json

ABOUT = "rlm_jax"


def export_policy(
    folder: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: str | os.PathLike[str],
    *,
    value_head: ValueHead | None = None,
    state_value: StateValue | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes a policy for `models.load.load_model` and `text.tokenizer.load_tokenizer`.

    Args:
      params: on whatever devices they are; adapters must be merged before.
      tokenizer: a folder with the tokenizer's files, a tokenizer.json or a SentencePiece .model.
      value_head: judges the policy's hidden states; always float32.
      state_value: judges the task's states by itself.
      metadata: JSON about the training.
      dtype: float32, bfloat16 or float16 for policy and `state_value`; the policy's by default.
      overwrite: replace a model that lies in `folder`; never replaces any other folder.

    Returns:
      The folder, which appears complete or not at all.

    Raises:
      FileNotFoundError: there is no such tokenizer.
      ValueError: `params`, `value_head`, `tokenizer` and `cfg` do not fit each other, `metadata` is
        not JSON, or `folder` must not be written.
    """
    dtype = float_dtype(params.embed.dtype if dtype is None else dtype)
    read = _reader(params, cfg)
    _check_head(value_head, cfg)
    about = _check_json(metadata or {})
    _check_tokenizer(tokenizer, cfg)
    with new_model_folder(folder, overwrite=overwrite) as scratch:
        write_hf(scratch, cfg, read, dtype)
        write_json(scratch / CONFIG, {**read_json(scratch / CONFIG), ABOUT: about})
        _copy_tokenizer(Path(tokenizer), scratch)
        if value_head is not None:
            save_value_head(scratch, value_head)
        if state_value is not None:
            save_state_value(scratch, state_value, dtype)
    return Path(folder)


def _reader(params: Params, cfg: ModelConfig) -> Callable[[str], np.ndarray]:
    """Reads one parameter by name; ValueError when they are not those that `cfg` describes."""
    arrays = name_leaves(params)
    shapes = dict(described_shapes(cfg))
    for name in [*shapes, *arrays]:
        found = list(arrays[name].shape) if name in arrays else "missing"
        wanted = list(shapes[name]) if name in shapes else "no parameter"
        if found != wanted:
            raise ValueError(f"{name} is {found}, in the config it is {wanted}")
    return lambda name: np.asarray(arrays[name])


def _check_head(head: ValueHead | None, cfg: ModelConfig) -> None:
    width = cfg.model_dim if head is None else head.layers[0].weight.shape[-1]
    if width != cfg.model_dim:
        raise ValueError(
            f"the value head reads a width of {width}, the policy's is {cfg.model_dim}"
        )


def _check_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is not JSON: {error}") from None


def _check_tokenizer(source: str | os.PathLike[str], cfg: ModelConfig) -> None:
    size = load_tokenizer(Path(source)).vocab_size
    if size > cfg.vocab_size:
        raise ValueError(f"{source}: {size} tokens do not fit a vocabulary of {cfg.vocab_size}")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """A folder's tokenizer files, or the one file under the name that it is looked for."""
    if source.is_file():
        shutil.copyfile(source, folder / f"tokenizer{source.suffix}")
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
