"""Rollouts: the policy finishes a path, and what comes of it is what the path is worth.

The Monte-Carlo estimate of a state's value (Blueprint 4.3.4, appendix C.1.2 "simulation"; spec B2,
B4: labels of the value network). The one idea: a rollout is the decoding of steps, one after the
other, behind keys and values that are thrown away; all rollouts of a round are rows of one batch,
share the contexts of the paths they start from, and end where the task decides, the solution ends
or the tokens do.

With a task that checks steps a rollout is worth 1 when it solves the problem and `dead_value`
otherwise. Without one it is worth the share of the structure's finished solutions, rollouts among
them, that state its answer (rStar's self-consistency reward, arXiv 2408.06195), and nothing if it
did not finish. Either way the value is discounted by the steps a rollout took.

Deviations: x1 rolls out with a gold answer and rates a failure -1 (`dead_value` -1 does). A beam
method rolls out by beams of one: the likeliest token, or one sample.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, PyTree, UInt32
from rlm_jax.inference.attention import Context
from rlm_jax.inference.beam import BEAM_METHODS
from rlm_jax.inference.decode import decode_steps
from rlm_jax.reasoning.language_task import check_steps
from rlm_jax.reasoning.language_values import Paths
from rlm_jax.reasoning.language_world import LanguageConfig, LanguageModel
from rlm_jax.reasoning.operators.evaluate import average_rollouts, self_consistency
from rlm_jax.reasoning.structure import Structure
from rlm_jax.text.answers import AnswerState, answer_key


@struct
class Rollouts:
    """M rollouts of each of R paths, and their cost to each of B structures.

    made: it took at least one token. solved, finished: the task says it is right; it ended by
    itself, right or wrong. answer_key: what it states in the end. num_steps, num_tokens: taken.
    num_checks: steps that the task looked at. num_calls: network calls.
    """

    made: Bool[Array, "R M"]
    solved: Bool[Array, "R M"]
    finished: Bool[Array, "R M"]
    answer_key: UInt32[Array, "R M"]
    num_steps: Int32[Array, "R M"]
    num_tokens: Int32[Array, "B"]
    num_checks: Int32[Array, "B"]
    num_calls: Int32[Array, "B"]


@struct
class _Loop:
    """R * M running rollouts; keys, values: of the steps behind them, per layer [R*M, G, T, E]."""

    index: Int32[Array, ""]
    running: Bool[Array, "Q"]
    solved: Bool[Array, "Q"]
    finished: Bool[Array, "Q"]
    used: Int32[Array, "Q"]
    num_steps: Int32[Array, "Q"]
    num_checks: Int32[Array, "Q"]
    num_calls: Int32[Array, "B"]
    hidden: Float[Array, "Q D"]
    answers: AnswerState
    state: PyTree
    caches: tuple[Float[Array, "Q G T K"], ...]


def value_by_rollouts(
    lm: LanguageModel,
    cfg: LanguageConfig,
    paths: Paths,
    structure: Structure,
    contexts: tuple[Context, ...],
    tokens_left: Int32[Array, "B"],
) -> tuple[Float32[Array, "R"], Rollouts]:
    """Values of the paths by `cfg.num_rollouts` rollouts of each, and the rollouts.

    Args:
      contexts: keys and values of all that stands before the paths' ends. tokens_left: what each
        structure may spend on them; it is shared out evenly.
    """
    batch = tokens_left.shape[0]
    wanted = paths.fresh & ~paths.terminal
    count = wanted.reshape(batch, -1).sum(-1) * cfg.num_rollouts
    share = jnp.repeat(tokens_left // jnp.maximum(count, 1), wanted.shape[0] // batch)
    room = jnp.minimum(cfg.model.context_length - paths.ends, cfg.rollout_tokens)
    limits = jnp.where(wanted, jnp.clip(share, 0, jnp.maximum(room, 0)), 0)
    rollouts = roll_out(lm, cfg, paths, contexts, limits, batch)
    if cfg.task is not None:
        rewards = jnp.where(rollouts.solved, 1.0, cfg.dead_value)
        made = rollouts.made
    else:
        rewards, made = _agreement(structure, paths, rollouts)
    settings = {"discount": cfg.rollout_discount}
    return average_rollouts(rewards, rollouts.num_steps, made, **settings), rollouts


def roll_out(
    lm: LanguageModel,
    cfg: LanguageConfig,
    paths: Paths,
    contexts: tuple[Context, ...],
    limits: Int32[Array, "R"],
    num_structures: int,
) -> Rollouts:
    """Goes on from every path, step by step, until all rollouts have ended.

    Args:
      limits: most tokens for each rollout of a path; 0 makes none.
    """
    count, num_paths = cfg.num_rollouts, limits.shape[0]
    numbers = jnp.arange(count, dtype=jnp.int32)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(paths.keys, numbers)
    keys = keys.reshape(-1)
    starts, limits = jnp.repeat(paths.ends, count), jnp.repeat(limits, count)
    offset = jnp.arange(cfg.rollout_tokens, dtype=jnp.int32)[None]
    # Beams of one node change places, and rollouts have keys and values of their own behind them.
    alone = cfg.sampling.method in BEAM_METHODS

    def body(loop: _Loop) -> _Loop:
        behind = Context(None, loop.caches, starts[:, None] + offset, offset < loop.used[:, None])
        most = jnp.minimum(limits - loop.used, lm.step_rule.max_tokens)
        steps = decode_steps(
            lm.policy,
            fold(keys, loop.index),
            loop.hidden,
            loop.answers,
            cfg=cfg.model,
            contexts=(*contexts, behind),
            starts=starts + loop.used,
            limits=jnp.where(loop.running, most, 0),
            rule=lm.step_rule,
            answer_rule=lm.answer_rule,
            sampling=cfg.sampling,
            num_siblings=1 if alone else count,
            num_slots=min(lm.step_rule.max_tokens, cfg.rollout_tokens),
        )
        verdicts = check_steps(
            cfg.task, lm.task_tables, loop.state, steps.tokens, steps.length, steps.terminal
        )
        used = loop.used + steps.length
        calls = steps.length.reshape(num_structures, -1).max(-1)
        return _Loop(
            index=loop.index + 1,
            running=loop.running & ~verdicts.terminal & (used < limits),
            solved=loop.solved | verdicts.solved,
            finished=loop.finished | verdicts.terminal,
            used=used,
            num_steps=loop.num_steps + loop.running,
            num_checks=loop.num_checks + verdicts.num_checks,
            num_calls=loop.num_calls + calls,
            hidden=steps.hidden,
            answers=steps.answers,
            state=_keep(loop.running, verdicts.state, loop.state),
            caches=_append(loop.caches, steps.caches, loop.used, steps.length),
        )

    loop = jax.lax.while_loop(
        lambda loop: loop.running.any(), body, _begin(cfg, paths, limits, num_structures)
    )

    def by_path(array: Array) -> Array:
        return array.reshape(num_paths, count)

    def by_structure(array: Array) -> Array:
        return array.reshape(num_structures, -1).sum(-1)

    return Rollouts(
        made=by_path(loop.used > 0),
        solved=by_path(loop.solved),
        finished=by_path(loop.finished),
        answer_key=by_path(answer_key(loop.answers)),
        num_steps=by_path(loop.num_steps),
        num_tokens=by_structure(loop.used),
        num_checks=by_structure(loop.num_checks),
        num_calls=loop.num_calls,
    )


def _begin(cfg, paths, limits, num_structures) -> _Loop:
    def repeat(array: Array) -> Array:
        return jnp.repeat(array, cfg.num_rollouts, axis=0)

    none, hidden = limits * 0, repeat(paths.hidden)
    shape = (limits.shape[0], cfg.model.num_kv_heads, cfg.rollout_tokens, 2 * cfg.model.head_dim)
    empty = jnp.broadcast_to(hidden[:, :1, None, None] * 0, shape)
    return _Loop(
        index=none.sum(),
        running=limits > 0,
        solved=none != 0,
        finished=none != 0,
        used=none,
        num_steps=none,
        num_checks=none,
        num_calls=none.reshape(num_structures, -1).sum(-1),
        hidden=hidden,
        answers=jax.tree.map(repeat, paths.answers),
        state=jax.tree.map(repeat, paths.task_state),
        caches=(empty,) * cfg.model.num_layers,
    )


def _keep(running: Bool[Array, "Q"], new: PyTree, old: PyTree) -> PyTree:
    """The new states of rollouts that were running."""

    def pick(fresh: Array, known: Array) -> Array:
        return jnp.where(running.reshape(-1, *(1 for _ in fresh.shape[1:])), fresh, known)

    return jax.tree.map(pick, new, old)


def _append(caches, steps, used, length):
    """Puts each row's new tokens [Q, G, S, 2E] behind its `used` first ones of [Q, G, T, 2E]."""
    num_slots, num_tokens = steps[0].shape[2], caches[0].shape[2]
    place = jnp.arange(num_tokens, dtype=jnp.int32)[None] - used[:, None]
    taken = ((place >= 0) & (place < length[:, None]))[:, None, :, None]
    place = jnp.clip(place, 0, num_slots - 1)[:, None, :, None]
    return tuple(
        jnp.where(taken, jnp.take_along_axis(step, place, 2), cache)
        for cache, step in zip(caches, steps, strict=True)
    )


def _agreement(
    structure: Structure, paths: Paths, rollouts: Rollouts
) -> tuple[Float32[Array, "R M"], Bool[Array, "R M"]]:
    """What rollouts are worth without a task, and which count: a path that has ended is its own."""
    batch = structure.depth.shape[0]
    ended = (paths.terminal & paths.fresh)[:, None]
    once = jnp.arange(rollouts.made.shape[1]) == 0
    finished = rollouts.finished | (ended & once)
    stated = jnp.where(ended, paths.answer_key[:, None], rollouts.answer_key)
    stated = stated.reshape(batch, -1)
    votes = jnp.concatenate([structure.answer_key, stated], 1)
    voters = jnp.concatenate([structure.terminal & structure.alive, finished.reshape(batch, -1)], 1)
    share = self_consistency(stated, votes, voters).reshape(finished.shape)
    return jnp.where(finished, share, 0.0), rollouts.made | (ended & once)
