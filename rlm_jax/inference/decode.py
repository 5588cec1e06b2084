"""Decoding steps: R rows at once, each until its own step ends, in one compiled loop.

Row r continues a context it shares with other rows. Its first token is sampled from the hidden
state its context ended with, so no token of the context is forwarded again; every sampled token,
the last one of the step too, is forwarded exactly once, which leaves the step's keys and values
and the hidden state its children start from. The loop ends when all rows have ended.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, Key
from rlm_jax.inference.attention import Context, make_decode_attend
from rlm_jax.inference.sampling import SamplingConfig, choose_tokens, token_confidence
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params
from rlm_jax.models.transformer import forward, unembed
from rlm_jax.text.answers import AnswerRule, AnswerState, update_answer
from rlm_jax.text.steps import StepRule, StepState, init_step_state, update_step


@struct
class DecodedSteps:
    """One step per row.

    tokens: [R, S], 0 behind the end. length: tokens of the step. terminal: it ended the solution.
    logprob, behaviour_logprob: sums over its tokens. confidence: sum of token confidences.
    hidden: the state after the last token. keys, values: per layer [R, G, S, E]. answers: what the
    path has stated so far. num_calls: iterations the loop ran, for all rows together.
    """

    tokens: Int32[Array, "R S"]
    length: Int32[Array, "R"]
    terminal: Bool[Array, "R"]
    logprob: Float32[Array, "R"]
    behaviour_logprob: Float32[Array, "R"]
    confidence: Float32[Array, "R"]
    hidden: Float[Array, "R D"]
    keys: tuple[Float[Array, "R G S E"], ...]
    values: tuple[Float[Array, "R G S E"], ...]
    answers: AnswerState
    num_calls: Int32[Array, ""]


@struct
class _Loop:
    index: Int32[Array, ""]
    ended: Bool[Array, "R"]
    step: StepState
    out: DecodedSteps


def decode_steps(
    params: Params,
    keys: Key[Array, "R"],
    hidden: Float[Array, "R D"],
    answers: AnswerState,
    *,
    cfg: ModelConfig,
    contexts: tuple[Context, ...],
    starts: Int32[Array, "R"],
    limits: Int32[Array, "R"],
    rule: StepRule,
    answer_rule: AnswerRule,
    sampling: SamplingConfig,
    num_siblings: int,
    num_slots: int,
) -> DecodedSteps:
    """Samples one step for every row.

    Args:
      keys: one per row; token t of a row depends on its key and t alone.
      hidden: the state each row's context ended with.
      starts: position of each row's first new token.
      limits: most tokens a row may take (0: the row is idle).
      num_siblings: consecutive rows that grow from one node (diverse beam search compares them).
      num_slots: S of the step caches, at least the rule's max_tokens; a whole number of pages.
    """
    positions = starts[:, None] + jnp.arange(num_slots, dtype=jnp.int32)

    def body(loop: _Loop) -> _Loop:
        active = ~loop.ended
        logits = unembed(params, loop.out.hidden, cfg=cfg)
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.index)
        choice = choose_tokens(row_keys, logits, active, sampling, num_siblings=num_siblings)
        token = jnp.where(active, choice.token, 0)
        attend = make_decode_attend(cfg, contexts, positions, loop.index)
        new_hidden, (new_keys, new_values) = forward(
            params,
            token[:, None],
            jax.lax.dynamic_slice_in_dim(positions, loop.index, 1, axis=1),
            cfg=cfg,
            attend=attend,
            state=(loop.out.keys, loop.out.values),
        )
        step, ended, terminal = update_step(rule, loop.step, token)
        length = loop.out.length + active
        confidence = token_confidence(choice.logprob, choice.top_logprobs)
        kept = active.astype(jnp.float32)
        out = dataclasses.replace(
            loop.out,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                loop.out.tokens, token[:, None], loop.index, axis=1
            ),
            length=length,
            terminal=loop.out.terminal | (active & terminal),
            logprob=loop.out.logprob + kept * choice.logprob,
            behaviour_logprob=loop.out.behaviour_logprob + kept * choice.behaviour_logprob,
            confidence=loop.out.confidence + kept * confidence,
            hidden=jnp.where(active[:, None], new_hidden[:, 0], loop.out.hidden),
            keys=new_keys,
            values=new_values,
            answers=_keep(active, update_answer(answer_rule, loop.out.answers, token), loop),
            num_calls=loop.out.num_calls + 1,
        )
        ended = loop.ended | ended | (length >= limits)
        return _Loop(loop.index + 1, ended, step, out)

    loop = _begin(hidden, answers, limits, cfg, num_slots)
    return jax.lax.while_loop(lambda loop: ~loop.ended.all(), body, loop).out


def _keep(active, new: AnswerState, loop: _Loop) -> AnswerState:
    """The new state in active rows, the old one in the others."""

    def pick(fresh, old):
        return jnp.where(active.reshape(-1, *(1 for _ in fresh.shape[1:])), fresh, old)

    return jax.tree.map(pick, new, loop.out.answers)


def _begin(hidden, answers, limits, cfg, num_slots) -> _Loop:
    rows = limits.shape[0]
    number = jnp.zeros_like(limits)
    real = number.astype(jnp.float32)
    shape = (rows, cfg.num_kv_heads, num_slots, cfg.head_dim)
    empty = jnp.broadcast_to(hidden[:, :1, None, None] * 0, shape)
    out = DecodedSteps(
        tokens=jnp.broadcast_to(number[:, None], (rows, num_slots)),
        length=number,
        terminal=number != 0,
        logprob=real,
        behaviour_logprob=real,
        confidence=real,
        hidden=hidden,
        keys=(empty,) * cfg.num_layers,
        values=(empty,) * cfg.num_layers,
        answers=answers,
        num_calls=number.sum(),
    )
    return _Loop(number.sum(), limits <= 0, init_step_state(number), out)
