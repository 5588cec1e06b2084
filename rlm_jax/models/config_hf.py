"""Hugging Face `config.json` to `ModelConfig` and back.

What a config asks for and this package does not compute (experts, partial rotation, biases in
other places, quantized checkpoints) is refused, since ignoring it would change the function.
"""

import math
from collections.abc import Mapping
from typing import Any

from rlm_jax.models.config import (
    MAX_LAYERS,
    ROPE_KINDS,
    ModelConfig,
    RopeScaling,
    check_count,
    read_number,
    read_optional,
    shortest_period,
)

HF_MODEL_TYPES = ("llama", "qwen2", "qwen3", "gemma3_text", "gemma3")

_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
# Those of Qwen2 and Qwen3; null in a config says that there is no window.
_QWEN_WINDOWS: dict[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}
_HF_ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face config.json (classic keys or the `rope_parameters` of transformers 5).

    Args:
      config: the parsed JSON of a llama, qwen2, qwen3, gemma3_text or gemma3 model (its text part).

    Raises:
      ValueError: unsupported model_type or feature, or a missing or malformed field.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError("config of model_type 'gemma3' has no text_config")
        outer = {k: config[k] for k in ("eos_token_id", "bos_token_id") if k in config}
        inner = {k: v for k, v in text.items() if v is not None}
        config, model_type = {**outer, **inner}, "gemma3_text"
    if model_type not in HF_MODEL_TYPES:
        raise ValueError(f"unsupported model_type {model_type!r}: accepted {HF_MODEL_TYPES}")
    gemma = model_type == "gemma3_text"
    if gemma:
        config = {**_GEMMA3_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    _refuse_hf_features(config, model_type)
    heads = read_number(config, "num_attention_heads", int)
    width = read_number(config, "hidden_size", int)
    act = config.get("hidden_activation") if gemma else config.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in _HF_ACTIVATIONS:
        raise ValueError(f"unsupported activation {act!r}: accepted {tuple(_HF_ACTIVATIONS)}")
    layers = read_number(config, "num_hidden_layers", int)
    window, pattern = _hf_windows(config, model_type, layers)
    theta, local_theta, scaling = _hf_rope(config, gemma)
    return ModelConfig(
        vocab_size=read_number(config, "vocab_size", int),
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=read_number(config, "num_key_value_heads", int, heads),
        head_dim=read_number(config, "head_dim", int, width // max(heads, 1)),
        ffn_dim=read_number(config, "intermediate_size", int),
        norm_eps=read_number(config, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta if pattern else None,
        activation=_HF_ACTIVATIONS[act],
        norm_offset=gemma,
        post_norms=gemma,
        qk_norm=gemma or model_type == "qwen3",
        qkv_bias=model_type == "qwen2",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        embed_scale=math.sqrt(width) if gemma else 1.0,
        sliding_window=window,
        sliding_pattern=pattern,
        attn_softcap=read_optional(config, "attn_logit_softcapping"),
        logit_softcap=read_optional(config, "final_logit_softcapping"),
        attn_scale=read_number(config, "query_pre_attn_scalar", float) if gemma else None,
        context_length=read_number(config, "max_position_embeddings", int, 2048),
        eos_ids=token_ids(config.get("eos_token_id")),
        bos_id=next(iter(token_ids(config.get("bos_token_id"))), None),
    )


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json (classic keys) that transformers reads back as the same model.

    Raises:
      ValueError: the combination of switches is none of the four families'.
    """
    model_type, architecture = _hf_family(cfg)
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.model_dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.context_length,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": False,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": list(cfg.eos_ids) if len(cfg.eos_ids) != 1 else cfg.eos_ids[0],
    }
    if not cfg.eos_ids:
        out["eos_token_id"] = None
    sliding = [cfg.is_sliding(layer) for layer in range(cfg.num_layers)]
    if model_type != "llama":
        out["sliding_window"] = cfg.sliding_window
        out["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    if model_type in ("qwen2", "qwen3"):
        out["use_sliding_window"] = any(sliding)
    if model_type == "gemma3_text":
        out["hidden_activation"] = "gelu_pytorch_tanh"
        out["query_pre_attn_scalar"] = _integral(cfg.attn_scale or cfg.head_dim)
        out["rope_local_base_freq"] = cfg.rope_local_theta or 10_000.0
        out["attn_logit_softcapping"] = cfg.attn_softcap
        out["final_logit_softcapping"] = cfg.logit_softcap
    else:
        out["hidden_act"] = "silu"
    return out


def _hf_family(cfg: ModelConfig) -> tuple[str, str]:
    gemma = (cfg.norm_offset, cfg.post_norms, cfg.activation == "gelu_tanh")
    plain = cfg.embed_scale == 1.0 and cfg.attn_scale in (None, cfg.head_dim)
    plain &= cfg.attn_softcap is None and cfg.logit_softcap is None and not any(gemma)
    plain &= cfg.rope_local_theta is None
    scaled = math.isclose(cfg.embed_scale, math.sqrt(cfg.model_dim), rel_tol=1e-6)
    if all(gemma) and cfg.qk_norm and not cfg.qkv_bias and scaled:
        return "gemma3_text", "Gemma3ForCausalLM"
    if plain and cfg.qk_norm and not cfg.qkv_bias:
        return "qwen3", "Qwen3ForCausalLM"
    if plain and cfg.qkv_bias and not cfg.qk_norm:
        return "qwen2", "Qwen2ForCausalLM"
    if plain and not cfg.qkv_bias and not cfg.qk_norm and cfg.sliding_window is None:
        return "llama", "LlamaForCausalLM"
    raise ValueError(f"this combination of switches is none of {HF_MODEL_TYPES[:4]}: {cfg}")


def _refuse_hf_features(config: Mapping[str, Any], model_type: str) -> None:
    """Refuses what would silently change the function that the weights were trained for."""
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(key) and not (key == "attention_bias" and model_type == "qwen2"):
            raise ValueError(f"{model_type} with {key}={config[key]!r} is not supported")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    if config.get("quantization_config"):
        raise ValueError("a quantized Hugging Face checkpoint (quantization_config) is unsupported")


def _hf_windows(
    config: Mapping[str, Any], model_type: str, layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    if model_type != "gemma3_text":
        config = {**_QWEN_WINDOWS, **config}
    window = config.get("sliding_window")
    if model_type == "llama" or window is None or not 0 < layers <= MAX_LAYERS:
        return None, ()
    if model_type != "gemma3_text" and not config.get("use_sliding_window", False):
        return None, ()
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ValueError(f"layer_types must be a list of {layers} names")
        unknown = set(map(str, kinds)) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ValueError(f"unsupported layer_types {sorted(unknown)}")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    elif model_type == "gemma3_text":
        period = read_number(config, "sliding_window_pattern", int)
        check_count("sliding_window_pattern", period)
        sliding = tuple(bool((layer + 1) % period) for layer in range(layers))
    else:
        first = read_number(config, "max_window_layers", int)
        sliding = tuple(layer >= first for layer in range(layers))
    pattern = shortest_period(sliding)
    return (read_number(config, "sliding_window", int) if pattern else None), pattern


def _hf_rope(config: Mapping[str, Any], gemma: bool) -> tuple[float, float | None, RopeScaling]:
    default = 1_000_000.0 if gemma else 10_000.0
    theta = read_number(config, "rope_theta", float, default)
    local = read_number(config, "rope_local_base_freq", float, 10_000.0) if gemma else None
    scaling = config.get("rope_scaling")
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        full = parameters.get("full_attention", parameters)
        window = parameters.get("sliding_attention")
        scaling = full if scaling is None else scaling
        if isinstance(full, Mapping):
            theta = read_number(full, "rope_theta", float, theta)
        if isinstance(window, Mapping) and gemma:
            local = read_number(window, "rope_theta", float, 10_000.0)
    context = config.get("max_position_embeddings")
    return theta, local, _rope_scaling_from_hf(scaling, context)


def _rope_scaling_from_hf(scaling: Any, context: Any) -> RopeScaling:
    if scaling is None:
        return RopeScaling()
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "none", None):
        return RopeScaling()
    if kind not in ROPE_KINDS:
        raise ValueError(f"unsupported rope scaling {kind!r}: accepted {ROPE_KINDS}")
    factor = read_number(scaling, "factor", float)
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = read_number(scaling, "original_max_position_embeddings", int, context)
    if kind == "llama3":
        low = read_number(scaling, "low_freq_factor", float)
        high = read_number(scaling, "high_freq_factor", float)
        return RopeScaling("llama3", factor, low, high, original)
    temperature = read_optional(scaling, "attention_factor")
    mscale, mscale_all = read_optional(scaling, "mscale"), read_optional(scaling, "mscale_all_dim")
    if temperature is None and mscale and mscale_all:
        log = 0.1 * math.log(max(factor, 1.0))
        temperature = (mscale * log + 1.0) / (mscale_all * log + 1.0)
    if scaling.get("truncate", True) is not True:
        raise ValueError("yarn rope scaling with truncate=false is not supported")
    return RopeScaling(
        "yarn",
        factor,
        original_context=original,
        beta_fast=read_optional(scaling, "beta_fast") or 32.0,
        beta_slow=read_optional(scaling, "beta_slow") or 1.0,
        attention_factor=temperature,
    )


def _rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        out["low_freq_factor"] = scaling.low_freq_factor
        out["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        out["beta_fast"], out["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        if scaling.attention_factor is not None:
            out["attention_factor"] = scaling.attention_factor
    return out


def token_ids(value: Any) -> tuple[int, ...]:
    """A config's special token (null, one id or a list of ids) as a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"a special token id must be an integer, got {str(token)[:80]!r}")
    return tuple(dict.fromkeys(values))


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
