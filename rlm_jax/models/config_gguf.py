"""GGUF metadata to `ModelConfig` (Llama-3's rotary factors are a tensor: see `gguf.py`).

GGUF leaves some constants to llama.cpp's source (Gemma-3's window pattern, its local rotary base
and the 27B model's score scale): they are written out here.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlm_jax.models.config import (
    MAX_LAYERS,
    ModelConfig,
    RopeScaling,
    read_number,
    read_optional,
    shortest_period,
)
from rlm_jax.text.gguf_vocab import end_of_generation_ids

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
END_ROLES = ("eos", "eot", "eom")


def config_from_gguf(metadata: Mapping[str, Any], *, tie_embeddings: bool = True) -> ModelConfig:
    """Reads the key-value metadata of a GGUF file.

    Args:
      metadata: keys to plain Python values (`read_gguf_metadata`).
      tie_embeddings: whether the file has no output.weight (metadata does not say).

    Raises:
      ValueError: unsupported architecture, or a missing or malformed key.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise ValueError(f"unsupported architecture {arch!r}: accepted {GGUF_ARCHITECTURES}")
    keys = {k[len(arch) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    heads = read_number(keys, "attention.head_count", int)
    width = read_number(keys, "embedding_length", int)
    layers = read_number(keys, "block_count", int)
    head_dim = read_number(keys, "attention.key_length", int, width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if read_number(keys, key, int, head_dim) != head_dim:
            raise ValueError(f"{arch}.{key} differs from the head width {head_dim}: unsupported")
    if read_optional(keys, "expert_count", int):
        raise ValueError(f"{arch} with experts (expert_count) is not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else None
    gemma = arch == "gemma3"
    window = read_optional(keys, "attention.sliding_window", int) if gemma else None
    pattern = _gguf_pattern(layers) if window else ()
    # llama.cpp keeps the 27B model's own scale (model_dim / heads) out of the file as well.
    attn_scale = float(width // max(heads, 1)) if gemma and layers == 62 else None
    local_theta = shortest_decimal(read_number(keys, "rope.freq_base_swa", float, 10_000.0))
    return ModelConfig(
        vocab_size=read_number(keys, "vocab_size", int, num_tokens),
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=read_number(keys, "attention.head_count_kv", int, heads),
        head_dim=head_dim,
        ffn_dim=read_number(keys, "feed_forward_length", int),
        norm_eps=shortest_decimal(read_number(keys, "attention.layer_norm_rms_epsilon", float)),
        rope_theta=shortest_decimal(read_number(keys, "rope.freq_base", float, 10_000.0)),
        rope_scaling=_gguf_rope_scaling(keys),
        rope_local_theta=local_theta if pattern else None,
        activation="gelu_tanh" if gemma else "silu",
        norm_offset=gemma,
        post_norms=gemma,
        qk_norm=arch in ("qwen3", "gemma3"),
        qkv_bias=arch == "qwen2",
        tie_embeddings=tie_embeddings,
        embed_scale=math.sqrt(width) if gemma else 1.0,
        sliding_window=window if pattern else None,
        sliding_pattern=pattern,
        logit_softcap=read_optional(keys, "final_logit_softcapping") or None,
        attn_scale=attn_scale or (float(head_dim) if gemma else None),
        context_length=read_number(keys, "context_length", int, 2048),
        eos_ids=_gguf_eos_ids(metadata),
        bos_id=read_optional(metadata, "tokenizer.ggml.bos_token_id", int),
    )


def _gguf_pattern(layers: int) -> tuple[bool, ...]:
    """Gemma-3: five windowed layers, then a full one (llama.cpp has this in its code too)."""
    return shortest_period(tuple(bool((i + 1) % 6) for i in range(min(layers, MAX_LAYERS))))


def _gguf_rope_scaling(keys: Mapping[str, Any]) -> RopeScaling:
    # As llama.cpp has it: what does not say its kind is linear, by a key that had another name.
    kind = str(keys.get("rope.scaling.type", "linear"))
    linear = read_number(keys, "rope.scale_linear", float, 1.0)
    factor = shortest_decimal(read_number(keys, "rope.scaling.factor", float, linear))
    if kind == "none" or factor in (0.0, 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise ValueError(f"unsupported rope.scaling.type {kind!r}: accepted none, linear, yarn")
    temperature = read_optional(keys, "rope.scaling.attn_factor") or 1.0
    return RopeScaling(
        "yarn",
        factor,
        original_context=read_number(keys, "rope.scaling.original_context_length", int),
        beta_fast=read_optional(keys, "rope.scaling.yarn_beta_fast") or 32.0,
        beta_slow=read_optional(keys, "rope.scaling.yarn_beta_slow") or 1.0,
        attention_factor=shortest_decimal(temperature) * (0.1 * math.log(max(factor, 1.0)) + 1.0),
    )


def _gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    named = [read_optional(metadata, f"tokenizer.ggml.{name}_token_id", int) for name in END_ROLES]
    kinds = metadata.get("tokenizer.ggml.token_type")
    numeric = kinds is None or (isinstance(kinds, np.ndarray) and kinds.dtype.kind in "iu")
    if isinstance(metadata.get("tokenizer.ggml.tokens"), list) and numeric:
        named = end_of_generation_ids(metadata)
    return tuple(dict.fromkeys(token for token in named if token is not None))


def shortest_decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
