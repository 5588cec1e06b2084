"""Named model shapes: a published one, and tiny ones of each family for tests and smoke runs."""

import dataclasses
import math

from rlm_jax.models.config import ModelConfig, RopeScaling

SMOLLM2_135M = ModelConfig(
    vocab_size=49_152,
    num_layers=30,
    model_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_dim=1536,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_embeddings=True,
    context_length=8192,
    eos_ids=(2, 0),
    bos_id=1,
)

TINY_LLAMA = ModelConfig(
    vocab_size=96,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling("llama3", factor=8.0, original_context=32),
    context_length=256,
    eos_ids=(2,),
    bos_id=1,
)
TINY_QWEN2 = dataclasses.replace(
    TINY_LLAMA, rope_scaling=RopeScaling(), qkv_bias=True, tie_embeddings=True, norm_eps=1e-6
)
TINY_QWEN3 = dataclasses.replace(
    TINY_LLAMA, rope_scaling=RopeScaling(), qk_norm=True, tie_embeddings=True, head_dim=12
)
TINY_GEMMA3 = dataclasses.replace(
    TINY_LLAMA,
    num_layers=3,
    rope_scaling=RopeScaling("linear", 8.0),
    rope_theta=1_000_000.0,
    rope_local_theta=10_000.0,
    activation="gelu_tanh",
    norm_offset=True,
    post_norms=True,
    qk_norm=True,
    tie_embeddings=True,
    embed_scale=math.sqrt(32),
    sliding_window=4,
    sliding_pattern=(True, True, False),
    attn_scale=16.0,
)

PRESETS = {
    "smollm2-135m": SMOLLM2_135M,
    "tiny-llama": TINY_LLAMA,
    "tiny-qwen2": TINY_QWEN2,
    "tiny-qwen3": TINY_QWEN3,
    "tiny-gemma3": TINY_GEMMA3,
}


def preset(name: str) -> ModelConfig:
    """The config of a named model; ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: accepted {tuple(PRESETS)}")
    return PRESETS[name]
