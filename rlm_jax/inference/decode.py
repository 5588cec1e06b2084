"""Decoding steps: R rows at once, each until its own step ends, in one compiled loop.

Row r continues a context it shares with other rows. Its first token is sampled from the hidden
state its context ended with, so no token of the context is forwarded again; every sampled token,
the last one of the step too, is forwarded exactly once, which leaves the step's keys and values
and the hidden state its children start from. The loop ends when all rows have ended.

With a beam method (`beam.py`) the rows of a node are beams: between two tokens a row may take over
what another row of its group has written so far, its step's own keys and values included. The
context, which the group shares, never moves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, Key
from rlm_jax.inference.allowed import Allowed, follow_allowed, hold_to_allowed
from rlm_jax.inference.attention import (
    Context,
    StepCache,
    empty_step_cache,
    join_step_cache,
    make_decode_attend,
)
from rlm_jax.inference.beam import BEAM_METHODS, Growth, begin_beams, follow, grow_beams
from rlm_jax.inference.copying import Copies, follow_copies, hold_to_copies
from rlm_jax.inference.sampling import (
    Choice,
    SamplingConfig,
    Uncertainty,
    as_by_model,
    choose_tokens,
    token_confidence,
    token_uncertainty,
)
from rlm_jax.inference.tried import Tried, follow_tried, take_away
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
    hidden: the state after the last token. caches: the step's keys and values, per layer
    (`attention.join_cache`). answers: what the path has stated so far. num_calls: iterations the
    loop ran, for all rows together.
    forwarded_tokens: what went through the network in this row; with beams not what the row's step
    measures, for beams are dropped and others share their first tokens.
    score: by which beams are ranked, best first in each group: log-probability, with its Gumbel
    noise if the beam is stochastic; -inf where there is no step. None with other methods.
    uncertainty: sums over the tokens, of the distributions they were chosen from (temperature 1,
    all of the vocabulary); None where it was not asked for.
    token_logprobs: [R, S], of each token; None unless steps are not to be written again.
    """

    tokens: Int32[Array, "R S"]
    length: Int32[Array, "R"]
    terminal: Bool[Array, "R"]
    logprob: Float32[Array, "R"]
    behaviour_logprob: Float32[Array, "R"]
    confidence: Float32[Array, "R"]
    hidden: Float[Array, "R D"]
    caches: tuple[Float[Array, "R G S K"], ...]
    answers: AnswerState
    num_calls: Int32[Array, ""]
    forwarded_tokens: Int32[Array, "R"]
    score: Float32[Array, "R"] | None = None
    uncertainty: Uncertainty | None = None
    token_logprobs: Float32[Array, "R S"] | None = None


@struct
class _Loop:
    """`out` is without caches, which stand beside it as they are while steps grow."""

    index: Int32[Array, ""]
    ended: Bool[Array, "R"]
    step: StepState
    out: DecodedSteps
    caches: tuple[StepCache, ...]
    tried: Tried | None = None
    copies: Copies | None = None
    allowed: Allowed | None = None


# What moves with a beam, the caches and the score apart.
_BEAM_FIELDS = (
    "tokens", "length", "terminal", "logprob", "behaviour_logprob", "confidence", "uncertainty",
    "hidden", "answers",
)  # fmt: skip


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
    with_uncertainty: bool = False,
    tried: Tried | None = None,
    copies: Copies | None = None,
    allowed: Allowed | None = None,
    first_bias: Float32[Array, "V"] | Float32[Array, "R V"] | None = None,
) -> DecodedSteps:
    """Samples one step for every row.

    Args:
      keys: one per row; token t of a row depends on its key and t alone, or on those of the first
        row of its group if the method is a beam.
      hidden: the state each row's context ended with.
      starts: position of each row's first new token.
      limits: most tokens a row may take (0: the row is idle). Beams of one group have one limit,
        the smallest of the rows that are not idle.
      num_siblings: consecutive rows that grow from one node; beam methods compare them.
      num_slots: S of the step caches, at least the rule's max_tokens; a whole number of pages.
      with_uncertainty: also sum up how unsure the model was, for two passes over the logits.
      tried: steps that the rows are not to write. copies: what those are held to that go back.
        Neither is for beam methods. allowed: steps that the rows are held to.
      first_bias: added to the logits of each step's first token, of all rows or of each
        (MASKED_SCORE: no step begins with it). All log-probabilities are of the policy so changed.

    Raises:
      ValueError: the rows are no whole number of groups, or beams are given steps to avoid.
    """
    if (tried is not None or copies is not None) and sampling.method in BEAM_METHODS:
        raise ValueError(f"sampling method {sampling.method!r} takes neither `tried` nor `copies`")
    if limits.shape[0] % num_siblings:
        raise ValueError(f"{limits.shape[0]} rows are no multiple of num_siblings={num_siblings}")
    positions = starts[:, None] + jnp.arange(num_slots, dtype=jnp.int32)
    score = None
    if sampling.method in BEAM_METHODS:
        limits, score = begin_beams(
            keys, limits, sampling, num_siblings=num_siblings, num_slots=num_slots
        )

    def body(loop: _Loop) -> _Loop:
        logits = unembed(params, loop.out.hidden, cfg=cfg)
        if first_bias is not None:
            logits = logits + jnp.where(loop.index == 0, first_bias, 0.0)
        if loop.copies is not None:
            logits = hold_to_copies(logits, loop.copies, loop.index)
        if loop.allowed is not None:
            logits = hold_to_allowed(logits, loop.allowed, loop.index)
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.index)
        unsure = token_uncertainty(logits) if with_uncertainty else None
        if loop.out.score is None:
            active = ~loop.ended
            left = logits if loop.tried is None else take_away(logits, loop.tried, loop.index)
            choice = choose_tokens(row_keys, left, active, sampling, num_siblings=num_siblings)
            if loop.tried is not None:
                choice = as_by_model(choice, logits)
        else:
            growth = grow_beams(
                row_keys,
                logits,
                loop.out.score,
                loop.out.behaviour_logprob,
                loop.ended,
                limits > 0,
                sampling,
                num_siblings=num_siblings,
            )
            loop, active, choice = _move_beams(loop, growth), growth.grew, growth.choice
            unsure = jax.tree.map(functools.partial(follow, parent=growth.parent), unsure)
        token = jnp.where(active, choice.token, 0)
        attend = make_decode_attend(cfg, contexts, positions, loop.index)
        new_hidden, caches = forward(
            params,
            token[:, None],
            jax.lax.dynamic_slice_in_dim(positions, loop.index, 1, axis=1),
            cfg=cfg,
            attend=attend,
            state=loop.caches,
        )
        step, ended, terminal = update_step(rule, loop.step, token)
        answers = _keep(active, update_answer(answer_rule, loop.out.answers, token), loop)
        out = _add_token(loop, active, choice, unsure, token, terminal, new_hidden[:, 0], answers)
        ended = ~active | ended | (out.length >= limits)
        tried = None if loop.tried is None else follow_tried(loop.tried, loop.index, token)
        copies = None if loop.copies is None else follow_copies(loop.copies, loop.index, token)
        allowed = None if loop.allowed is None else follow_allowed(loop.allowed, loop.index, token)
        return _Loop(loop.index + 1, ended, step, out, caches, tried, copies, allowed)

    def decode(apart: bool) -> DecodedSteps:
        cache = empty_step_cache(hidden, cfg, num_slots, apart=apart)
        loop = _begin(
            hidden, answers, limits, score, num_slots, with_uncertainty, tried is not None
        )
        loop = dataclasses.replace(
            loop,
            caches=(cache,) * cfg.num_layers,
            tried=tried,
            copies=copies,
            allowed=allowed,
        )
        loop = jax.lax.while_loop(lambda loop: ~loop.ended.all(), body, loop)
        return dataclasses.replace(loop.out, caches=tuple(map(join_step_cache, loop.caches)))

    return jax.lax.platform_dependent(
        cpu=functools.partial(decode, True), default=functools.partial(decode, False)
    )


def _move_beams(loop: _Loop, growth: Growth) -> _Loop:
    """Gives every row what the beam that takes it has written so far."""
    old = loop.out
    own_rows = jnp.arange(growth.parent.shape[1])

    def move(tree):
        return jax.tree.map(lambda array: follow(array, growth.parent), tree)

    # Stochastic beams keep their order as long as none is dropped: the best offer of each has its
    # beam's own score. Before the first token there is nothing to move.
    moved = (growth.parent != own_rows).any() & (loop.index > 0)
    out = dataclasses.replace(
        old,
        score=growth.score,
        **{name: move(getattr(old, name)) for name in _BEAM_FIELDS},
    )
    # Of a beam that is given up nothing is left.
    holds = growth.score > -jnp.inf
    out = dataclasses.replace(
        out,
        tokens=jnp.where(holds[:, None], out.tokens, 0),
        **{
            name: jnp.where(holds, getattr(out, name), 0).astype(getattr(out, name).dtype)
            for name in ("length", "terminal", "logprob", "behaviour_logprob", "confidence")
        },
    )
    allowed = loop.allowed
    if allowed is not None:
        allowed = dataclasses.replace(allowed, followed=move(allowed.followed))
    caches = jax.lax.cond(moved, move, lambda tree: tree, loop.caches)
    return dataclasses.replace(loop, step=move(loop.step), out=out, caches=caches, allowed=allowed)


def _add_token(
    loop: _Loop, active, choice: Choice, unsure, token, terminal, hidden, answers
) -> DecodedSteps:
    """The steps with the new token behind them in active rows."""
    old, kept = loop.out, active.astype(jnp.float32)
    confidence = token_confidence(choice.logprob, choice.top_logprobs)
    return dataclasses.replace(
        old,
        tokens=jax.lax.dynamic_update_slice_in_dim(old.tokens, token[:, None], loop.index, axis=1),
        length=old.length + active,
        terminal=old.terminal | (active & terminal),
        logprob=old.logprob + kept * choice.logprob,
        behaviour_logprob=old.behaviour_logprob + kept * choice.behaviour_logprob,
        confidence=old.confidence + kept * confidence,
        uncertainty=jax.tree.map(lambda total, new: total + kept * new, old.uncertainty, unsure),
        token_logprobs=jax.tree.map(
            lambda logs: jax.lax.dynamic_update_slice_in_dim(
                logs, (kept * choice.logprob)[:, None], loop.index, axis=1
            ),
            old.token_logprobs,
        ),
        hidden=jnp.where(active[:, None], hidden, old.hidden),
        answers=answers,
        num_calls=old.num_calls + 1,
        forwarded_tokens=old.forwarded_tokens + active,
    )


def _keep(active, new: AnswerState, loop: _Loop) -> AnswerState:
    """The new state in active rows, the old one in the others."""

    def pick(fresh, old):
        return jnp.where(active.reshape(-1, *(1 for _ in fresh.shape[1:])), fresh, old)

    return jax.tree.map(pick, new, loop.out.answers)


def _begin(hidden, answers, limits, score, num_slots, with_uncertainty, with_logprobs) -> _Loop:
    rows = limits.shape[0]
    number = jnp.zeros_like(limits)
    real = number.astype(jnp.float32)
    out = DecodedSteps(
        tokens=jnp.broadcast_to(number[:, None], (rows, num_slots)),
        length=number,
        terminal=number != 0,
        logprob=real,
        behaviour_logprob=real,
        confidence=real,
        hidden=hidden,
        caches=(),
        answers=answers,
        num_calls=number.sum(),
        forwarded_tokens=number,
        score=score,
        uncertainty=Uncertainty(real, real) if with_uncertainty else None,
        token_logprobs=real[:, None] + jnp.zeros(num_slots) if with_logprobs else None,
    )
    idle = limits <= 0 if score is None else score == -jnp.inf
    return _Loop(number.sum(), idle, init_step_state(number), out, caches=())
