"""Reading and writing model descriptions: config.json and GGUF metadata."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.models.config import ModelConfig, RopeScaling, shortest_period
from rlm_jax.models.config_gguf import config_from_gguf
from rlm_jax.models.config_hf import config_from_hf, config_to_hf
from rlm_jax.models.presets import PRESETS, preset
from rlm_jax.models.rope import inverse_frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
GGUF = {
    "general.architecture": "qwen3",
    "qwen3.block_count": np.uint32(4).item(),
    "qwen3.context_length": 512,
    "qwen3.embedding_length": 32,
    "qwen3.feed_forward_length": 64,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 16,
    "qwen3.attention.value_length": 16,
    "qwen3.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "qwen3.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["a", "b", "<|im_end|>", "<|endoftext|>"],
    "tokenizer.ggml.token_type": np.array([1, 1, 3, 3], np.int32),
    "tokenizer.ggml.eos_token_id": 2,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_json_round_trip(name):
    cfg = preset(name)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(cfg)))) == cfg


def test_classic_and_nested_rope_keys_agree():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    classic = config_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    nested = config_from_hf({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert classic == nested
    assert classic.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_gemma3_text_config_falls_back_to_the_family():
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    cfg = config_from_hf({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (8, 4, 256)
    assert cfg.tie_embeddings
    assert cfg.norm_offset
    assert cfg.eos_ids == (1, 106)
    assert cfg.sliding_pattern == (True,) * 5 + (False,)
    assert [cfg.layer_window(i) for i in (4, 5, 6)] == [1024, None, 1024]
    assert [cfg.layer_theta(i) for i in (4, 5)] == [10_000.0, 1_000_000.0]


def test_windows_of_qwen_that_a_config_leaves_out_are_at_their_defaults():
    config = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 32, "use_sliding_window": True}
    cfg = config_from_hf(config)
    assert cfg.sliding_window == 4096
    assert cfg.sliding_pattern == (False,) * 28 + (True,) * 4
    assert config_from_hf({**config, "sliding_window": None}).sliding_window is None
    assert config_from_hf({**config, "use_sliding_window": False}).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, RopeScaling()),
        ({"qwen3.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"qwen3.rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"qwen3.rope.scaling.factor": 4.0, "qwen3.rope.scaling.type": "none"}, RopeScaling()),
    ],
)
def test_gguf_rope_scaling_of_no_named_kind_is_linear(changes, scaling):
    assert config_from_gguf({**GGUF, **changes}, tie_embeddings=False).rope_scaling == scaling


def test_rope_parameters_by_layer_type():
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    cfg = config_from_hf({"model_type": "gemma3_text", "rope_parameters": parameters})
    assert (cfg.rope_theta, cfg.rope_local_theta) == (2e6, 3e4)
    assert cfg.rope_scaling == RopeScaling("linear", 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"unsupported model_type 'mamba'.*qwen3.*gemma3"),
        ({"model_type": None}, "unsupported model_type None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be a number"),
        ({"hidden_size": 10**400}, "model_dim must be a positive integer"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is out of range"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be a positive finite"),
        ({"num_attention_heads": 0}, "num_heads must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 is above"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"hidden_act": "relu"}, "unsupported activation 'relu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unsupported rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "finite and >= 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"eos_token_id": 100}, "special token 100 is outside of 100 tokens"),
        ({"eos_token_id": ["x"]}, "special token id must be an integer"),
        ({"rope_theta": 1.0}, "rotary bases must be above 1"),
    ],
)
def test_bad_config_json_is_one_clear_error(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **changes})


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
junk |= st.lists(junk, max_size=3) | st.dictionaries(st.text(max_size=5), junk, max_size=2)
OPTIONAL_KEYS = (
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "eos_token_id",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "hidden_act",
    "text_config",
)


@settings(max_examples=150, deadline=None)
@given(
    model_type=st.sampled_from(["llama", "qwen2", "qwen3", "gemma3_text", "gemma3"]),
    changes=st.dictionaries(st.sampled_from([*LLAMA, *OPTIONAL_KEYS]), junk, max_size=4),
)
def test_any_config_json_gives_a_config_or_a_value_error(model_type, changes):
    config = {**LLAMA, **changes, "model_type": model_type}
    with contextlib.suppress(ValueError):
        assert isinstance(config_from_hf(config), ModelConfig)


def test_gguf_metadata():
    cfg = config_from_gguf(GGUF, tie_embeddings=False)
    assert cfg.qk_norm
    assert cfg.vocab_size == 4
    assert cfg.norm_eps == 1e-6
    assert cfg.head_dim == 16
    assert cfg.eos_ids == (2, 3)
    assert not cfg.tie_embeddings


gguf_junk = st.booleans() | st.integers(0, 2**64 - 1) | st.floats(width=32) | st.text(max_size=3)
gguf_junk |= st.lists(st.text(max_size=3), max_size=3)
gguf_junk |= st.lists(st.integers(0, 9), max_size=5).map(np.array)
GGUF_KEYS = [*GGUF, "qwen3.rope.scaling.type", "qwen3.rope.scaling.factor", "qwen3.expert_count"]


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(GGUF_KEYS), gguf_junk, max_size=4))
def test_any_gguf_metadata_gives_a_config_or_a_value_error(changes):
    with contextlib.suppress(ValueError):
        assert isinstance(config_from_gguf({**GGUF, **changes}), ModelConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, r"unsupported architecture 'mamba'.*gemma3"),
        ({"qwen3.block_count": None}, "block_count is missing"),
        ({"qwen3.attention.head_count": np.array([4, 4])}, "attention.head_count must be a number"),
        ({"qwen3.attention.value_length": 8}, "value_length differs from the head width 16"),
        ({"qwen3.expert_count": 8}, "experts"),
        ({"qwen3.rope.scaling.type": "longrope", "qwen3.rope.scaling.factor": 2.0}, "longrope"),
        ({"tokenizer.ggml.tokens": None}, "vocab_size is missing"),
        ({"tokenizer.ggml.eos_token_id": 9}, "outside"),
    ],
)
def test_bad_gguf_metadata_is_one_clear_error(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf({**GGUF, **changes})


def test_a_mixture_of_families_has_no_config_json():
    cfg = dataclasses.replace(preset("tiny-qwen3"), embed_scale=4.0)
    with pytest.raises(ValueError, match="none of"):
        config_to_hf(cfg)


@given(st.lists(st.booleans(), min_size=1, max_size=12).map(tuple))
def test_shortest_period_repeats_to_the_pattern(pattern):
    period = shortest_period(pattern)
    if not any(pattern):
        assert period == ()
    else:
        assert tuple(period[i % len(period)] for i in range(len(pattern))) == pattern


@given(
    theta=st.floats(1e3, 1e7),
    kind=st.sampled_from(["none", "linear", "llama3", "yarn"]),
    factor=st.floats(1, 64),
)
def test_scaled_frequencies_lie_between_trained_and_interpolated(theta, kind, factor):
    scaling = RopeScaling(kind, factor, original_context=4096)
    plain, _ = inverse_frequencies(theta, 64, RopeScaling())
    scaled, multiplier = inverse_frequencies(theta, 64, scaling)
    assert np.all(scaled <= plain * 1.000001)
    assert np.all(scaled >= plain / factor * 0.999999)
    assert np.all(np.diff(scaled) < 0)
    assert multiplier >= 1
    if kind in ("llama3", "yarn"):
        assert scaled[0] == pytest.approx(plain[0])
