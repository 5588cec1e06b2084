"""A tiny language model that the tests of this room search over."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.models.heads import HeadConfig, init_value_head
from rlm_jax.models.params import init_params
from rlm_jax.models.presets import preset
from rlm_jax.reasoning.language import LanguageModel
from rlm_jax.reasoning.language_values import Judge
from rlm_jax.text.answers import make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule
from rlm_jax.text.tokenizer import ByteTokenizer


@functools.cache
def make_model():
    """A random byte-level model whose steps end at about a third of all bytes."""
    tokenizer = ByteTokenizer()
    cfg = dataclasses.replace(
        preset("tiny-llama"),
        vocab_size=tokenizer.vocab_size,
        eos_ids=tokenizer.eos_ids,
        bos_id=tokenizer.bos_id,
    )
    rule = make_step_rule(StepSpec("fixed", 7), tokenizer)
    # A random model says <eos> once in 259 tokens: let other bytes end steps and solutions too.
    byte = jnp.arange(tokenizer.vocab_size)
    rule = rule.replace(ends_alone=byte % 5 == 0, final=(byte % 23 == 0) | rule.final)
    suffix = jnp.asarray([257, 63, 10, 65], jnp.int32)
    judge = Judge(
        unfinished=suffix,
        finished=jnp.append(suffix[1:], 0),
        unfinished_length=jnp.int32(4),
        finished_length=jnp.int32(3),
        yes_ids=jnp.asarray([89, 121]),
        no_ids=jnp.asarray([78, 110]),
    )
    lm = LanguageModel(
        policy=init_params(jax.random.key(3), cfg),
        step_rule=rule,
        answer_rule=make_answer_rule(tokenizer),
        value_head=init_value_head(jax.random.key(4), cfg.model_dim, HeadConfig()),
        judge=judge,
    )
    return lm, cfg
