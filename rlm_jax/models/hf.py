"""Checkpoints in Hugging Face layout: safetensors and config.json, in a folder or on the hub.

Reading and writing go tensor by tensor. Nothing here executes what a checkpoint brings: pickled
weights (.bin, .pt) are refused, and an index may only name files of its own folder.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlm_jax.models.checkpoint import (
    Checkpoint,
    described_shapes,
    existing_path,
    float_dtype,
    load_params,
)
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.config_hf import config_from_hf, config_to_hf, token_ids
from rlm_jax.models.params import Params, name_leaves
from rlm_jax.models.tensor_file import TensorFile, write_tensors
from rlm_jax.text.tokenizer import read_json

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "value_head.safetensors",
    "state_value.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
)
_TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
}
# With four norms a layer, the name that is the MLP's norm elsewhere is attention's second one.
_LAYER_POST_NORMS = {
    **_LAYER,
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
_MULTIMODAL_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def load_hf(
    folder: str | os.PathLike[str], dtype: Any = jnp.float32
) -> tuple[Params, ModelConfig, dict[str, Any]]:
    """Loads a folder with config.json and safetensors (one file, or shards with an index).

    Returns:
      Parameters, config, and config.json itself.

    Raises:
      FileNotFoundError: the folder or a file in it is missing.
      ValueError: an unsupported or damaged checkpoint; names the file and the cause.
    """
    checkpoint = open_hf(folder)
    return load_params(checkpoint, dtype), checkpoint.cfg, checkpoint.metadata


def open_hf(folder: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder without reading its tensors; raises as `load_hf`."""
    folder = existing_path(folder, "checkpoint folder")
    metadata = read_json(existing_path(folder / CONFIG, "config (is it a model folder?)"))
    try:
        cfg = config_from_hf(_with_generation_eos(folder, metadata))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    files = _open_shards(folder)
    _check_names(folder, files, cfg)

    def shape_of(name: str) -> tuple[int, ...] | None:
        found = files.get(hf_name(name, cfg))
        return None if found is None else found[0].shapes[found[1]]

    def read(name: str) -> np.ndarray:
        file, stored_name = files[hf_name(name, cfg)]
        return file.read(stored_name)

    return Checkpoint(cfg, folder, shape_of, read, metadata)


def hf_name(name: str, cfg: ModelConfig) -> str:
    """The tensor of a parameter: "layers.3.wq" is "model.layers.3.self_attn.q_proj.weight"."""
    if name in _TOP:
        return _TOP[name]
    _, layer, field = name.split(".")
    return f"model.layers.{layer}.{(_LAYER_POST_NORMS if cfg.post_norms else _LAYER)[field]}"


def _with_generation_eos(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json names one end token, generation_config.json often more: all of them end."""
    merged = dict(config)
    extra = token_ids(read_json(folder / GENERATION).get("eos_token_id"))
    source = config.get("text_config")
    nested = source.get("eos_token_id") if isinstance(source, Mapping) else None
    own = token_ids(config.get("eos_token_id", nested))
    if extra:
        merged["eos_token_id"] = list(dict.fromkeys([*own, *extra]))
        if isinstance(source, Mapping):
            merged["text_config"] = {**source, "eos_token_id": merged["eos_token_id"]}
    return merged


def _open_shards(folder: Path) -> dict[str, tuple[TensorFile, str]]:
    """Every tensor under its text-model name, with the file that holds it and its name there."""
    found: dict[str, tuple[TensorFile, str]] = {}
    for file in map(TensorFile, _shard_paths(folder)):
        for stored in file.shapes:
            name = stored
            for prefix, text_prefix in _MULTIMODAL_PREFIXES.items():
                if stored.startswith(prefix):
                    name = text_prefix + stored.removeprefix(prefix)
            if name in found:
                raise ValueError(f"{folder}: tensor {name[:80]!r} occurs twice")
            found[name] = (file, stored)
    return found


def _shard_paths(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX}: has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{folder / INDEX}: {name[:200]!r} is not the name of a .safetensors file in "
                    "the same folder"
                )
        return [existing_path(folder / name, "shard (named in the index)") for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ValueError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run code when they are "
            "loaded: convert them to safetensors"
        )
    raise FileNotFoundError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _check_names(folder: Path, names: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Refuses tensors that the model would ignore although they change its function."""
    known = {hf_name(name, cfg) for name, _ in described_shapes(cfg)}
    for name in names:
        spare = name == _TOP["lm_head"] and cfg.tie_embeddings
        if name in known or spare or name.endswith("rotary_emb.inv_freq"):
            continue
        if cfg.post_norms and _VISION.match(name):
            continue
        raise ValueError(f"{folder}: unsupported tensor {name[:80]!r}")


def fetch_hub(repo: str) -> Path:
    """Downloads (or finds in the cache) a hub repository's weights, config and tokenizer files.

    Args:
      repo: "org/name", or "org/name@revision".

    Raises:
      ValueError: huggingface_hub is missing, there is no network, or no such repository.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"to fetch {repo!r} the hub client is needed: pip install 'rlm_jax[hub]'"
        ) from None
    name, _, revision = repo.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(HUB_FILES)
        )
    except Exception as error:  # the client raises its HTTP library's errors too
        cause = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"cannot fetch {repo!r} from the hub ({type(error).__name__}: {''.join(cause)}); "
            "offline, give a local folder or a .gguf file"
        ) from None
    return Path(found)


def save_hf(
    folder: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    dtype: Any = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Saves parameters as safetensors and config.json, which transformers loads as they are.

    Args:
      dtype: float32, bfloat16 or float16; None keeps the parameters' own.
      overwrite: replace a model that lies in `folder`; never replaces any other folder.

    Returns:
      The folder, which appears complete or not at all.
    """
    arrays = name_leaves(params)
    dtype = params.embed.dtype if dtype is None else dtype

    def read(name: str) -> np.ndarray:
        return np.asarray(arrays[name])

    with new_model_folder(folder, overwrite=overwrite) as scratch:
        write_hf(scratch, cfg, read, dtype, max_shard_bytes=max_shard_bytes)
    return Path(folder)


def write_hf(
    folder: Path,
    cfg: ModelConfig,
    read: Callable[[str], np.ndarray],
    dtype: Any,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config and weights into an existing folder, asking `read` for each parameter once."""
    dtype = float_dtype(dtype)
    config = {**config_to_hf(cfg), "torch_dtype": dtype.name}
    write_json(folder / CONFIG, config)
    ends = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config[k] is not None}
    write_json(folder / GENERATION, ends)
    shapes = [(hf_name(name, cfg), shape) for name, shape in described_shapes(cfg)]
    ours = {hf_name(name, cfg): name for name, _ in described_shapes(cfg)}
    shards = _split_shards(shapes, dtype.itemsize, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        write_tensors(folder / file, shard, lambda name: read(ours[name]), dtype)
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        total = sum(math.prod(shape) for _, shape in shapes) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _split_shards(
    shapes: list[tuple[str, tuple[int, ...]]], item_bytes: int, max_shard_bytes: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Fills shards in order; a tensor larger than a shard gets its own."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards, used = [[]], 0
    for name, shape in shapes:
        size = math.prod(shape) * item_bytes
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    return shards


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_model_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends well, and vanishes when not.

    Raises:
      ValueError: `folder` is a file; or it is not empty, and either `overwrite` is off or what
        lies there is not a model (no config.json).
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, not a folder")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder}: is not empty (overwrite replaces a model there)")
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: holds no {CONFIG}, so it is not replaced")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        _swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, folder: Path) -> None:
    if not folder.exists():
        scratch.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old)
