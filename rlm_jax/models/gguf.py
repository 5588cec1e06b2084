"""Loading GGUF files (llama.cpp's format), tensor by tensor, dequantized to the dtype asked for.

Two conventions are undone, so that the rest of the package knows one: llama.cpp interleaves the
rotary pairs in Llama's query and key rows, and adds 1 to Gemma's norm weights.
"""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlm_jax.models.checkpoint import Checkpoint, described_shapes, load_params
from rlm_jax.models.config import ModelConfig, RopeScaling
from rlm_jax.models.config_gguf import config_from_gguf
from rlm_jax.models.gguf_file import (
    TENSOR_TYPES,
    GGUFFile,
    TensorEntry,
    read_gguf_file,
    read_gguf_metadata,
)
from rlm_jax.models.params import Params
from rlm_jax.models.rope import llama3_factors

__all__ = ["load_gguf", "open_gguf", "read_gguf_metadata"]

ROPE_FACTORS = "rope_freqs.weight"
# What Llama 3.1 to 3.3 were trained with; the file holds only the resulting factors.
LLAMA3_ORIGINAL_CONTEXT = 8192
_TOP = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_LAYER = {
    "attn_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "wo": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight",
    "w_up": "ffn_up.weight",
    "w_down": "ffn_down.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}


def load_gguf(
    path: str | os.PathLike[str], dtype: Any = jnp.float32
) -> tuple[Params, ModelConfig, dict[str, Any]]:
    """Loads a llama, qwen2, qwen3 or gemma3 GGUF file.

    Args:
      path: the file; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K tensors.
      dtype: float32, bfloat16 or float16 of the parameters.

    Returns:
      Parameters, config, and the file's key-values as plain Python values.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged or unsupported file; names the file and the cause.
    """
    checkpoint = open_gguf(path)
    return load_params(checkpoint, dtype), checkpoint.cfg, checkpoint.metadata


def open_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a GGUF file without reading its tensors; raises as `load_gguf`."""
    file = read_gguf_file(path)
    try:
        cfg = _read_config(file)
        _check_tensors(file, cfg)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    permuted = file.metadata["general.architecture"] == "llama"

    def shape_of(name: str) -> tuple[int, ...] | None:
        entry = file.tensors.get(gguf_name(name))
        return None if entry is None else entry.shape

    def read(name: str) -> np.ndarray:
        array = _dequantize(file, file.tensors[gguf_name(name)])
        field = name.rpartition(".")[2]
        if permuted and field in ("wq", "wk"):
            heads = cfg.num_heads if field == "wq" else cfg.num_kv_heads
            return _split_rotary_pairs(array, heads)
        if cfg.norm_offset and field.endswith("norm"):
            return array - np.float32(1)
        return array

    return Checkpoint(cfg, file.path, shape_of, read, file.metadata)


def gguf_name(name: str) -> str:
    """The GGUF tensor of a parameter: "layers.3.wq" is "blk.3.attn_q.weight"."""
    if name in _TOP:
        return _TOP[name]
    _, layer, field = name.split(".")
    return f"blk.{layer}.{_LAYER[field]}"


def _read_config(file: GGUFFile) -> ModelConfig:
    cfg = config_from_gguf(file.metadata, tie_embeddings=_TOP["lm_head"] not in file.tensors)
    entry = file.tensors.get(ROPE_FACTORS)
    if entry is None:
        return cfg
    if entry.shape != (cfg.head_dim // 2,) or entry.type_name != "F32":
        raise ValueError(f"{ROPE_FACTORS} is {entry.type_name} of shape {entry.shape}")
    return dataclasses.replace(cfg, rope_scaling=_llama3_scaling(_dequantize(file, entry), cfg))


def _llama3_scaling(factors: np.ndarray, cfg: ModelConfig) -> RopeScaling:
    """Finds the "llama3" rule behind stored factors, and refuses factors that it does not give."""
    if not np.all(np.isfinite(factors)) or np.any(factors < 1):
        raise ValueError(f"{ROPE_FACTORS} holds factors below 1 or not finite")
    if np.all(factors == 1):
        return RopeScaling()
    factor = float(factors.max())
    scaling = RopeScaling("llama3", factor, original_context=LLAMA3_ORIGINAL_CONTEXT)
    base = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    if not np.allclose(llama3_factors(base, scaling), factors, rtol=1e-3):
        raise ValueError(f"{ROPE_FACTORS} does not follow the Llama-3 rule: unsupported")
    return scaling


def _check_tensors(file: GGUFFile, cfg: ModelConfig) -> None:
    """Refuses tensors that the model would ignore, and quantisations nothing here can read."""
    last = f"blk.{cfg.num_layers - 1}."
    if not any(name.startswith(last) for name in file.tensors):
        raise ValueError(f"block_count is {cfg.num_layers}, but there is no tensor {last}*")
    known = {gguf_name(name) for name, _ in described_shapes(cfg)} | {ROPE_FACTORS}
    for name, entry in file.tensors.items():
        if name not in known:
            raise ValueError(f"unsupported tensor {name[:80]!r}")
        if entry.type_number not in TENSOR_TYPES:
            accepted = ", ".join(t[0] for t in TENSOR_TYPES.values())
            raise ValueError(
                f"tensor {name[:80]!r} has unsupported quantisation {entry.type_name}: "
                f"accepted {accepted}"
            )


def _split_rotary_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (2i, 2i + 1) of each head to rows (i, i + E/2): llama.cpp's order to half-rotation."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantize(file: GGUFFile, entry: TensorEntry) -> np.ndarray:
    """A tensor as float32 (float16 stays float16)."""
    raw = file.raw(entry)
    if entry.type_name == "F32":
        return raw.view(np.float32).reshape(entry.shape)
    if entry.type_name == "F16":
        return raw.view(np.float16).reshape(entry.shape)
    if entry.type_name == "BF16":
        return raw.view(jnp.bfloat16).reshape(entry.shape)
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ValueError(
            "quantised GGUF tensors need the gguf package: pip install 'rlm_jax[gguf]'"
        ) from None
    blocks = raw.reshape(*entry.shape[:-1], -1)
    with np.errstate(all="ignore"):
        return quants.dequantize(blocks, GGMLQuantizationType(entry.type_number))
