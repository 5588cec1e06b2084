"""The shape of a decoder-only transformer: one frozen, hashable description for four families.

One idea: Llama, Qwen2, Qwen3 and Gemma-3 differ in a handful of switches (bias, qk-norm, norm
placement, windows, rotary scaling), so a model is a value of `ModelConfig` and never a class.
`config_hf.py` and `config_gguf.py` read it from a checkpoint's own description, and write it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_KINDS = ("none", "linear", "llama3", "yarn")

MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind: "none"; "linear" (all frequencies divided by `factor`); "llama3" (low frequencies divided,
      high ones kept, blended between); "yarn" (NTK-by-parts with a temperature).
    original_context: trained context in tokens ("llama3" and "yarn").
    attention_factor: "yarn" multiplier of cos and sin; None means 0.1 ln(factor) + 1.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling {self.kind!r}: accepted are {ROPE_KINDS}")
        if not (math.isfinite(self.factor) and self.factor >= 1.0):
            raise ValueError(f"rope scaling factor must be finite and >= 1, got {self.factor}")
        if self.kind in ("llama3", "yarn") and not 0 < self.original_context < 2**31:
            raise ValueError(f"rope scaling {self.kind!r} needs original_context > 0")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError("llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor")
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError("yarn rope scaling needs 0 < beta_slow < beta_fast")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static description of a model; hashable, so it can be a static argument of `jax.jit`.

    norm_offset: RMSNorm multiplies by 1 + weight (Gemma) instead of weight.
    post_norms: two more norms a layer, after attention and after the MLP (Gemma).
    embed_scale: multiplier of token embeddings (sqrt(model_dim) in Gemma).
    sliding_window: keys a windowed layer sees, the query's own included.
    sliding_pattern: True where a layer is windowed; repeated over the layers. Empty: none is.
    rope_local_theta: rotary base of windowed layers (unscaled); None: one base for all layers.
    attn_scale: scores are multiplied by attn_scale ** -0.5; None means head_dim.
    attn_softcap, logit_softcap: cap * tanh(x / cap) on scores or final logits.

    Raises:
      ValueError: a field is out of range or contradicts another one.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rope_local_theta: float | None = None
    activation: str = "silu"
    norm_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    sliding_window: int | None = None
    sliding_pattern: tuple[bool, ...] = ()
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    attn_scale: float | None = None
    context_length: int = 2048
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self):
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        for name in ("norm_eps", "rope_theta", "embed_scale"):
            _check_positive(name, getattr(self, name))
        for name in ("rope_local_theta", "attn_softcap", "logit_softcap", "attn_scale"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if min(self.rope_theta, self.rope_local_theta or self.rope_theta) <= 1:
            raise ValueError("rotary bases must be above 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers={self.num_layers} is above {MAX_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: accepted {ACTIVATIONS}")
        _check_windows(self)
        _check_token_ids(self)

    def is_sliding(self, layer: int) -> bool:
        """Whether layer `layer` sees a window of keys instead of all of them."""
        pattern = self.sliding_pattern
        return bool(pattern) and pattern[layer % len(pattern)]

    def layer_window(self, layer: int) -> int | None:
        """Keys that layer `layer` sees (the query's own included), or None for all."""
        return self.sliding_window if self.is_sliding(layer) else None

    def layer_has_local_rope(self, layer: int) -> bool:
        """Whether layer `layer` rotates by `rope_local_theta`, unscaled."""
        return self.rope_local_theta is not None and self.is_sliding(layer)

    def layer_theta(self, layer: int) -> float:
        """Rotary base of layer `layer`."""
        if self.rope_local_theta is not None and self.is_sliding(layer):
            return self.rope_local_theta
        return self.rope_theta


_COUNTS = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "context_length",
)


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def _check_windows(cfg: ModelConfig) -> None:
    if len(cfg.sliding_pattern) > cfg.num_layers:
        raise ValueError(
            f"sliding_pattern names {len(cfg.sliding_pattern)} layers of {cfg.num_layers}"
        )
    if any(cfg.sliding_pattern) != (cfg.sliding_window is not None):
        raise ValueError("sliding_window and a sliding_pattern with a True go together")
    if cfg.sliding_window is not None:
        check_count("sliding_window", cfg.sliding_window)
    if cfg.rope_local_theta is not None and cfg.sliding_window is None:
        raise ValueError("rope_local_theta needs sliding layers")


def _check_token_ids(cfg: ModelConfig) -> None:
    bos = () if cfg.bos_id is None else (cfg.bos_id,)
    for token in (*cfg.eos_ids, *bos):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"a special token id must be an integer >= 0, got {token!r}")
        if token >= cfg.vocab_size:
            raise ValueError(f"special token {token} is outside of {cfg.vocab_size} tokens")


def shortest_period(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest prefix whose repetition gives `pattern`; empty when nothing in it is True."""
    if not any(pattern):
        return ()
    for period in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % period] for i in range(len(pattern))):
            return pattern[:period]
    return pattern


def read_number(source: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """`source[key]` as `kind` (int or float); a missing or null value gives `default`."""
    value = source.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing")
    accepted = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{key} must be a number ({kind.__name__}), got {str(value)[:80]!r}")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError(f"{key} is out of range") from None


def read_optional(source: Mapping[str, Any], key: str, kind: type = float) -> Any:
    return None if source.get(key) is None else read_number(source, key, kind)
