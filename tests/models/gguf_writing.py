"""Writes recipe models as GGUF the way llama.cpp's converter does, with the gguf package."""

import gguf
import numpy as np

from rlm_jax.models.config import ModelConfig
from rlm_jax.models.gguf import gguf_name
from rlm_jax.models.rope import llama3_factors

# A byte-level BPE of 80 tokens: three special ones, "!" to "k", and what the merges make.
TOKENS = ["<unk>", "<bos>", "<|im_end|>", *map(chr, range(33, 108)), "ab", "bc"]
MERGES = ["a b", "b c"]
FLOATS = {"F32": np.float32, "F16": np.float16}


def architecture(cfg: ModelConfig) -> str:
    if cfg.post_norms:
        return "gemma3"
    return "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"


def write_gguf(path, cfg: ModelConfig, weights: dict[str, np.ndarray], matrix_type: str = "F32"):
    """Matrices in `matrix_type`, vectors in F32; Llama's rotary rows interleaved, Gemma's norms
    plus 1, Llama-3's frequency factors as a tensor."""
    arch = architecture(cfg)
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, cfg, arch)
    if arch == "llama" and cfg.rope_scaling.kind == "llama3":
        base = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        factors = llama3_factors(base, cfg.rope_scaling).astype(np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    for name, array in weights.items():
        field = name.rpartition(".")[2]
        if arch == "llama" and field in ("wq", "wk"):
            array = interleave(array, cfg.num_heads if field == "wq" else cfg.num_kv_heads)
        if arch == "gemma3" and field.endswith("norm"):
            array = array + np.float32(1)
        add_tensor(writer, gguf_name(name), array, matrix_type if array.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer, cfg: ModelConfig, arch: str) -> None:
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.context_length)
    writer.add_embedding_length(cfg.model_dim)
    writer.add_feed_forward_length(cfg.ffn_dim)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(cfg.sliding_window)
    if cfg.logit_softcap:
        writer.add_final_logit_softcapping(cfg.logit_softcap)
    if cfg.rope_scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(cfg.rope_scaling.kind))
        writer.add_rope_scaling_factor(cfg.rope_scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(cfg.rope_scaling.original_context)
    writer.add_token_list(TOKENS[: cfg.vocab_size])
    writer.add_token_types([1, 3, 3, *[1] * 77][: cfg.vocab_size])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_merges(MERGES)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def interleave(array: np.ndarray, num_heads: int) -> np.ndarray:
    """HF's half-rotation rows to llama.cpp's pairs: per head, (first half, second half) zipped."""
    heads = np.split(array, num_heads)
    zipped = [np.stack(np.split(h, 2), axis=1).reshape(h.shape) for h in heads]
    return np.concatenate(zipped)


def add_tensor(writer, name: str, array: np.ndarray, type_name: str) -> None:
    if type_name in FLOATS:
        writer.add_tensor(name, np.ascontiguousarray(array, FLOATS[type_name]))
        return
    kind = gguf.GGMLQuantizationType[type_name]
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
