"""Judging paths inside the expander: which ones, by which evaluators, at what cost.

New steps are judged when they are made, or requested nodes when they are visited. Either way they
are paths to be judged (`Paths`); what the task has decided, a step that was not made and a copy of
another are not worth judging, and cost nothing. A node visited again keeps its value.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32, Key, UInt32
from rlm_jax.inference.attention import Context
from rlm_jax.inference.decode import DecodedSteps
from rlm_jax.reasoning.language_lookahead import look_ahead, recall
from rlm_jax.reasoning.language_rollout import value_by_rollouts
from rlm_jax.reasoning.language_task import Verdicts, decided_values
from rlm_jax.reasoning.language_values import (
    Paths,
    evaluate_paths,
    looks_ahead,
    parse_evaluator,
)
from rlm_jax.reasoning.language_world import LanguageConfig, LanguageModel, Rows, World
from rlm_jax.reasoning.operators.evaluate import mix_values
from rlm_jax.reasoning.operators.structure import child_numbers
from rlm_jax.reasoning.protocol import Request
from rlm_jax.reasoning.structure import Structure
from rlm_jax.text.answers import answer_key

_ROLLOUTS = 2**31 - 4  # A number that no node and no token has.


class NewSteps(NamedTuple):
    """R decoded steps, what the task says of them, and which of them are copies of others."""

    steps: DecodedSteps
    verdicts: Verdicts
    duplicate: Bool[Array, "R"]


@struct
class Judged:
    """Values of new steps [R] and of requested nodes [Q = B * W], and what they cost.

    scored_tokens: given tokens that were forwarded. rollout_tokens: tokens that were sampled.
    ahead: what was read of the states one step on from what was judged; None if nothing was.
    """

    value: Float32[Array, "R"]
    node_value: Float32[Array, "Q"]
    scored_tokens: Int32[Array, "B"]
    rollout_tokens: Int32[Array, "B"]
    model_calls: Int32[Array, "B"]
    verifier_calls: Int32[Array, "B"]
    ahead: Float32[Array, "P M"] | None = None


def evaluate(
    lm: LanguageModel,
    cfg: LanguageConfig,
    keys: Key[Array, "B"],
    world: World,
    structure: Structure,
    request: Request,
    new: NewSteps,
    rows: Rows,
    contexts: tuple[Context, ...],
    tokens_left: Int32[Array, "B"],
) -> Judged:
    """Values of the new steps, or of the requested nodes: the task's, or those of evaluators.

    Args:
      contexts: the prompts, and the paths of the requested nodes. tokens_left: what rollouts may
        spend.
    """
    at = jnp.maximum(request.nodes, 0)
    known = jnp.take_along_axis(structure.model_value, at, 1).reshape(-1)
    none = jnp.zeros_like(new.steps.logprob)
    if cfg.judge == "visit":
        paths = _paths_of_nodes(cfg, keys, world, structure, request)
        states = jnp.take_along_axis(structure.state_key, at, 1)
        judged = _judge(lm, cfg, world, paths, states, structure, contexts, tokens_left)
        value = jnp.where(paths.fresh, judged.value, known)
        solved = jnp.take_along_axis(structure.proven, at, 1).reshape(-1)
        decided = paths.terminal & (cfg.task is not None)
        value = decided_values(value, decided, solved, cfg.dead_value)
        made = new.verdicts.values(none, cfg.dead_value)
        return dataclasses.replace(judged, value=made, node_value=value)
    paths = _paths_of_steps(keys, world, structure, request, new, rows)
    offset = jnp.arange(new.steps.tokens.shape[1], dtype=jnp.int32)[None]
    own = Context(
        keys=None,
        values=new.steps.caches,
        positions=rows.step_starts(structure)[:, None] + offset,
        valid=offset < new.steps.length[:, None],
    )
    states = new.verdicts.state_key.reshape(at.shape[0], -1)
    judged = _judge(lm, cfg, world, paths, states, structure, (*contexts, own), tokens_left)
    value = new.verdicts.values(judged.value, cfg.dead_value)
    return dataclasses.replace(judged, value=value, node_value=known)


def stated_answers(steps: DecodedSteps, verdicts: Verdicts) -> UInt32[Array, "R"]:
    """Answer keys of new steps; what is refuted states no answer."""
    refuted = verdicts.decided & ~verdicts.solved
    return jnp.where(refuted, 0, answer_key(steps.answers)).astype(jnp.uint32)


def _judge(lm, cfg, world, paths, state_keys, structure, contexts, tokens_left) -> Judged:
    """Values of the paths, which end in states of these keys, by the evaluators of `cfg`, mixed."""
    batch = structure.depth.shape[0]
    weights = parse_evaluator(cfg.evaluator)
    ahead = None
    if looks_ahead(cfg.evaluator):
        known = recall(world.ahead, structure, state_keys)
        seen = look_ahead(lm.state_value, cfg.task, paths.task_state, paths.fresh, known)
        ahead, paths = seen.value, dataclasses.replace(paths, ahead=seen)
    nothing = tokens_left * 0
    scored = rollout_tokens = calls = checks = nothing
    values = []
    for name in weights:
        if name == "rollout":
            value, rollouts = value_by_rollouts(lm, cfg, paths, structure, contexts, tokens_left)
            rollout_tokens, checks = rollouts.num_tokens, rollouts.num_checks
            calls += rollouts.num_calls
        else:
            value, tokens = evaluate_paths(
                lm.policy,
                lm.value_head,
                lm.judge,
                paths,
                structure,
                contexts,
                model=cfg.model,
                evaluator=name,
                aggregate=cfg.aggregate,
                value_fn=cfg.value_fn,
                state_value=lm.state_value,
                task=cfg.task,
            )
            tokens = tokens.reshape(batch, -1).sum(-1)
            scored += tokens
            calls += tokens > 0
        values.append(value)
    value = values[0] if len(values) == 1 else mix_values(values, [*weights.values()], cfg.mixture)
    return Judged(value, value, scored, rollout_tokens, calls, checks, ahead)


def _path_keys(keys: Key[Array, "B"], numbers: Int32[Array, "B M"]) -> Key[Array, "R"]:
    """A key for the rollouts of each node: it hangs on the problem and the node's number alone."""
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(keys, jnp.full_like(numbers[:, 0], _ROLLOUTS))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, numbers).reshape(-1)


def _paths_of_steps(keys, world, structure, request, new, rows) -> Paths:
    """The paths that end with the new steps."""
    steps, verdicts = new.steps, new.verdicts
    ends = rows.step_starts(structure) + steps.length
    numbers = child_numbers(structure, request)
    return Paths(
        logprob=rows.of_parent(world.path_logprob) + steps.logprob,
        confidence=rows.of_parent(world.path_confidence) + steps.confidence,
        num_tokens=ends - world.prompt_length[rows.structure],
        hidden=steps.hidden,
        terminal=verdicts.terminal,
        answer_key=stated_answers(steps, verdicts),
        depth=rows.of_parent(structure.depth) + 1,
        above=rows.of_parent(structure.model_value),
        ends=ends,
        fresh=(steps.length > 0) & ~verdicts.decided & ~new.duplicate,
        answers=steps.answers,
        task_state=verdicts.state,
        keys=_path_keys(keys, numbers.reshape(numbers.shape[0], -1)),
        uncertainty=rows.add_to_parents(world.path_uncertainty, steps.uncertainty),
    )


def _paths_of_nodes(cfg, keys, world, structure, request) -> Paths:
    """The paths that end with the requested nodes; a node is judged on its first visit."""
    index = jnp.arange(request.nodes.shape[0])[:, None]
    nodes = jnp.maximum(request.nodes, 0)

    def take(array):
        return array[index, nodes].reshape(-1, *array.shape[2:])

    ends = structure.span_start + structure.span_length
    above = structure.model_value[index, jnp.maximum(structure.parent, 0)]
    terminal = take(structure.terminal)
    moved = structure.num_created - structure.num_nodes
    return Paths(
        logprob=take(world.path_logprob),
        confidence=take(world.path_confidence),
        num_tokens=take(ends - world.prompt_length[:, None]),
        hidden=take(world.hidden),
        terminal=terminal,
        answer_key=take(structure.answer_key),
        depth=take(structure.depth),
        above=take(above),
        ends=take(ends),
        fresh=request.active.reshape(-1)
        & (take(structure.visits) == 0)
        & ~(terminal & (cfg.task is not None)),
        answers=jax.tree.map(take, world.answers),
        task_state=jax.tree.map(take, world.task_state),
        keys=_path_keys(keys, nodes + moved[:, None]),
        uncertainty=jax.tree.map(take, world.path_uncertainty),
    )
