"""Tiny models of two families, and a rule set over a byte vocabulary."""

import dataclasses

import jax
import pytest

from rlm_jax.models.params import init_params
from rlm_jax.models.presets import preset
from rlm_jax.text.answers import make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule
from rlm_jax.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="session", params=["tiny-llama", "tiny-gemma3"])
def tiny(request):
    """(params, config) of a random byte-level model; gemma3 brings windows of four tokens."""
    tokenizer = ByteTokenizer()
    cfg = dataclasses.replace(
        preset(request.param),
        vocab_size=tokenizer.vocab_size,
        eos_ids=tokenizer.eos_ids,
        bos_id=tokenizer.bos_id,
        attn_softcap=20.0 if request.param == "tiny-gemma3" else None,
    )
    return init_params(jax.random.key(1), cfg), cfg


@pytest.fixture(scope="session")
def rules():
    """Steps of at most six tokens that nothing but their length or <eos> ends, and answer keys."""
    tokenizer = ByteTokenizer()
    return make_step_rule(StepSpec("fixed", 6), tokenizer), make_answer_rule(tokenizer)
