"""Language models in the search: policy as expander, value as evaluator.

This file and the language_*.py beside it are the only ones of this room that know them.
`make_expand` gives the expander that both drivers run. Expanding a node forwards each new token
once and nothing else; the keys, tokens and states of the new steps go into the world
(`language_world.py`) under the indices that their nodes will have. Where the task can check a step
from the problem alone, it is checked as soon as it is decoded (`language_task.py`), and what it
decides is not judged any more (`language_evaluate.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import zero_budget
from rlm_jax.core.types import Array, Bool, Float32, Int32, Key
from rlm_jax.inference.allowed import Allowed, make_allowed
from rlm_jax.inference.attention import Context
from rlm_jax.inference.copying import Copies, make_copies
from rlm_jax.inference.decode import DecodedSteps, decode_steps
from rlm_jax.inference.pages import (
    gather_paths,
    gather_prompts,
    path_buckets,
    release_pages,
    write_steps,
)
from rlm_jax.inference.tried import Tried, make_tried
from rlm_jax.models.attention import MASKED_SCORE
from rlm_jax.reasoning.language_evaluate import Judged, NewSteps, evaluate, stated_answers
from rlm_jax.reasoning.language_lookahead import UNREAD, look_ahead, recall, weigh_steps
from rlm_jax.reasoning.language_task import Verdicts, check_steps
from rlm_jax.reasoning.language_values import needs_contexts
from rlm_jax.reasoning.language_world import (
    LanguageConfig,
    LanguageModel,
    Rows,
    World,
    admit,
    begin,
    keep_world,
    make_world,
    step_slots,
)
from rlm_jax.reasoning.operators.evaluate import log_odds
from rlm_jax.reasoning.operators.structure import child_numbers, child_slots
from rlm_jax.reasoning.protocol import Expand, Outcome, Request
from rlm_jax.reasoning.structure import NO_NODE, Structure, paths_up, tokens_left

__all__ = [
    "LanguageConfig",
    "LanguageModel",
    "World",
    "admit",
    "begin",
    "keep_world",
    "make_expand",
    "make_world",
    "step_slots",
]


# Steps of a node of a tree that its next one is kept from repeating.
_MOST_TRIED = 64


def make_expand(cfg: LanguageConfig) -> Expand:
    """The expander: `expand(lm, keys, world, structure, request) -> (outcome, world)`."""

    def expand(
        lm: LanguageModel,
        keys: Key[Array, "B"],
        world: World,
        structure: Structure,
        request: Request,
    ) -> tuple[Outcome, World]:
        slots = child_slots(structure, request)
        lanes = jnp.maximum(request.nodes, 0)
        rows = Rows(lanes, request.num_children)
        pages = release_pages(world.pages, structure.alive)
        world = dataclasses.replace(world, pages=pages)
        prompts = gather_prompts(world.pages)

        allowed, num_seen = None, tokens_left(structure) * 0
        if cfg.sampling.legal_only:
            allowed, num_seen, world = find_allowed(lm, cfg, world, structure, request)
        decode = _plan_steps(lm, cfg, keys, world, structure, request, rows, allowed)

        def judge(steps: DecodedSteps, contexts: tuple[Context, ...]) -> tuple[NewSteps, Judged]:
            verdicts = _check(lm, cfg, world, steps, rows)
            duplicate = steps.length < 0
            if request.distinct:
                duplicate = _find_duplicates(world, structure, request, steps, verdicts)
            left = tokens_left(structure) - steps.length.reshape(slots.shape[0], -1).sum(-1)
            new = NewSteps(steps, verdicts, duplicate)
            judged = evaluate(lm, cfg, keys, world, structure, request, new, rows, contexts, left)
            return new, judged

        reads_contexts = needs_contexts(cfg.evaluator)

        def grow(num_pages: int) -> DecodedSteps | tuple[NewSteps, Judged]:
            contexts = (prompts, gather_paths(world.pages, lanes, num_pages))
            steps = decode(contexts=contexts)
            return judge(steps, contexts) if reads_contexts else steps

        # Attention costs what its keys measure: deep paths alone pay for long ones. What reads no
        # context is compiled once for all lengths.
        buckets = path_buckets(world.pages)
        longest = jnp.take_along_axis(world.pages.table_length, lanes, 1).max()
        branch = (longest > jnp.asarray(buckets[:-1], jnp.int32)).sum()
        grow_fns = [functools.partial(grow, num_pages) for num_pages in buckets]
        grown = jax.lax.switch(branch, grow_fns)
        (steps, verdicts, duplicate), judged = grown if reads_contexts else judge(grown, ())
        duplicate = duplicate.reshape(slots.shape)
        judged = dataclasses.replace(
            judged,
            scored_tokens=judged.scored_tokens + num_seen,
            model_calls=judged.model_calls + (num_seen > 0),
        )
        outcome = _outcome(cfg, structure, request, steps, verdicts, judged, duplicate)
        keep = outcome.valid & ~duplicate
        ahead = judged.ahead if cfg.judge == "expansion" else None
        return outcome, _store(world, structure, rows, slots, steps, verdicts, ahead, keep)

    return expand


def _row_limits(structure, request, starts, rule, cfg):
    """Most tokens each row may take: the step's, the budget's even share, the context's room."""
    rows = request.grows.sum(-1) * request.num_children
    share = tokens_left(structure) // jnp.maximum(rows, 1)
    active = jnp.repeat(request.grows, request.num_children, axis=1)
    limit = jnp.minimum(jnp.where(active, share[:, None], 0), rule.max_tokens).reshape(-1)
    return jnp.clip(cfg.model.context_length - starts, 0, limit)


def _find_duplicates(world, structure, request, steps, verdicts) -> Bool[Array, "R"]:
    """Steps that equal an earlier one from the same node, of this request or of one before.

    They say the same, or they lead to the same state of the task.
    """
    batch, num_children = request.nodes.shape[0], request.num_children
    tokens = steps.tokens.reshape(batch, request.nodes.shape[1] * num_children, -1)
    length = steps.length.reshape(batch, -1)
    state = verdicts.state_key.reshape(batch, -1)
    parent = jnp.repeat(request.nodes, num_children, axis=1)

    def equal(other_tokens, other_length, other_state, other_parent):
        same = (tokens[:, :, None] == other_tokens[:, None]).all(-1)
        same &= length[:, :, None] == other_length[:, None]
        same |= (state[:, :, None] == other_state[:, None]) & (state[:, :, None] != 0)
        return same & (parent[:, :, None] == other_parent[:, None])

    earlier = jnp.tril(jnp.ones((parent.shape[1],) * 2, bool), -1)
    found = (equal(tokens, length, state, parent) & earlier).any(-1)
    # A node grown once more (a root sampled anew) has older children.
    living = jnp.where(structure.alive, structure.parent, NO_NODE - 1)
    again = (request.nodes[:, :, None] == living[:, None]) & request.grows[:, :, None]

    def look_back():
        older = equal(world.tokens, structure.span_length, structure.state_key, living)
        return older.any(-1)

    found |= jax.lax.cond(again.any(), look_back, lambda: jnp.zeros_like(found))
    return (found & (length > 0)).reshape(-1)


def _plan_steps(
    lm, cfg, keys, world, structure, request, rows, allowed
) -> functools.partial[DecodedSteps]:
    """`decode_steps` of one step for every row of the request, but for its contexts."""
    numbers = child_numbers(structure, request)
    starts = rows.step_starts(structure)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    return functools.partial(
        decode_steps,
        lm.policy,
        fold(keys, numbers.reshape(numbers.shape[0], -1)).reshape(-1),
        rows.of_parent(world.hidden),
        jax.tree.map(rows.of_parent, world.answers),
        cfg=cfg.model,
        starts=starts,
        limits=_row_limits(structure, request, starts, lm.step_rule, cfg),
        rule=lm.step_rule,
        answer_rule=lm.answer_rule,
        sampling=cfg.sampling,
        num_siblings=request.num_children,
        num_slots=world.tokens.shape[-1],
        with_uncertainty=world.path_uncertainty is not None,
        tried=find_tried(cfg, world, structure, rows) if cfg.sampling.no_repeats else None,
        copies=find_copies(lm, cfg, world, structure, rows) if cfg.sampling.copy_returns else None,
        allowed=allowed,
        first_bias=find_first_bias(lm, cfg, structure, rows),
    )


def find_first_bias(
    lm: LanguageModel, cfg: LanguageConfig, structure: Structure, rows: Rows
) -> Float32[Array, "V"] | Float32[Array, "R V"] | None:
    """What a step's first token is biased by: in a tree none goes back, in a chain few may, or
    those that stand where their evaluator sees no way on."""
    if cfg.task is None or cfg.task.returns is None:
        return None
    returns = cfg.task.returns(lm.task_tables)
    if not cfg.may_return:
        return jnp.where(returns, MASKED_SCORE, 0.0)
    bias: Array | float = cfg.sampling.return_bias
    if cfg.sampling.doubt_weight:
        moved = rows.of_parent(structure.state_key) != structure.state_key[rows.structure, 0]
        odds = jnp.where(moved, log_odds(rows.of_parent(structure.model_value)), 0.0)
        bias -= cfg.sampling.doubt_weight * odds[:, None]
    elif not bias:
        return None
    return jnp.where(returns, bias, 0.0)


def find_tried(cfg, world, structure, rows) -> Tried:
    """Steps that each row is not to write again, as they were written where the row stands."""
    if cfg.may_return:
        nodes, tried = _find_left(structure, rows.parents, cfg.max_depth)
    else:
        nodes, tried = _find_children(structure, rows.parents)
    batch = jnp.arange(nodes.shape[0])[:, None, None]

    def of_rows(array):
        return array[batch, nodes].reshape(-1, nodes.shape[-1], *array.shape[2:])

    length = jnp.where(tried.reshape(-1, nodes.shape[-1]), of_rows(structure.span_length), 0)
    return make_tried(of_rows(world.tokens), length, of_rows(world.token_logprobs))


def find_copies(lm, cfg, world, structure, rows) -> Copies:
    """What rows of chains are held to that go back: the states that were left, as they stand in the
    prompt and in the steps up to each row's node."""
    task, tables = cfg.task, lm.task_tables
    assert task is not None
    assert task.returns is not None
    assert task.marks is not None
    assert task.left is not None
    left = jax.vmap(task.left)(jax.tree.map(rows.of_parent, world.task_state))
    path = _list_chain(structure, rows.parents, cfg.max_depth)
    path = path.reshape(-1, path.shape[-1])
    at = rows.structure[:, None], jnp.maximum(path, 0)
    found = (structure.state_key[at][..., None] == left[:, None]) & (left[:, None] != 0)
    known = found.any(-1) & (path >= 0) & structure.alive[at]
    room = jnp.minimum(world.prompt_length, world.tokens.shape[-1])[rows.structure, None]
    length = jnp.where(path == 0, room, structure.span_length[at])
    length = jnp.where(known, length, 0)
    return make_copies(task.returns(tables), task.marks(tables), world.tokens[at], length)


def find_allowed(lm, cfg, world, structure, request) -> tuple[Allowed, Int32[Array, "B"], World]:
    """The legal steps of each row, spelled once for all rows of a node; in a chain, beside those
    that go back. And how many items were read of what they lead to, and the world that knows."""
    task, tables = cfg.task, lm.task_tables
    assert task is not None
    assert task.moves is not None
    spell = task.moves.spell
    states = jax.tree.map(Rows(jnp.maximum(request.nodes, 0), 1).of_parent, world.task_state)
    room = min(lm.step_rule.max_tokens, world.tokens.shape[-1])
    spelled = jax.vmap(lambda state: spell(tables, state, room))(states)
    bonus, num_seen = None, request.nodes[:, 0] * 0
    if cfg.sampling.outcome_weight:
        keys = jnp.take_along_axis(structure.state_key, jnp.maximum(request.nodes, 0), 1)
        known = recall(world.ahead, structure, keys)
        ahead = look_ahead(lm.state_value, task, states, request.grows.reshape(-1), known)
        world = _keep_ahead(world, jnp.where(request.grows, request.nodes, NO_NODE), ahead.value)
        bonus = weigh_steps(ahead, cfg.sampling.outcome_weight)
        bonus = jnp.repeat(bonus, request.num_children, axis=0)
        num_seen = ahead.num_items.reshape(request.nodes.shape).sum(1)
    tokens, length = (jnp.repeat(array, request.num_children, axis=0) for array in spelled)
    ends = task.moves.ends(tables)
    # Of tokens without text only some end a step; spare rows of an embedding end none.
    rule = lm.step_rule.ends | lm.step_rule.final
    ends &= jnp.pad(rule, (0, ends.shape[0] - rule.shape[0]))
    besides = jnp.zeros_like(ends) if task.returns is None else task.returns(tables)
    return make_allowed(tokens, length, ends, besides, bonus), num_seen, world


def _keep_ahead(world, nodes, values) -> World:
    """What was read of the states one step on from nodes [B, L]; NO_NODE: nothing is kept."""
    assert world.ahead is not None
    at = jnp.where(nodes >= 0, nodes, world.ahead.shape[1])
    values = values.reshape(*nodes.shape, -1)
    ahead = world.ahead.at[jnp.arange(nodes.shape[0])[:, None], at].set(values, mode="drop")
    return dataclasses.replace(world, ahead=ahead)


def _find_children(structure, parents):
    """Nodes of a tree, [B, rows, X], and which of them are children of each row's node, dead or
    not; beyond so many the first ones are left out."""
    index = jnp.arange(structure.capacity)
    below = structure.parent[:, None] == parents[..., None]
    below &= index < structure.num_nodes[:, None, None]
    most = min(structure.capacity, _MOST_TRIED)
    nodes, _ = jax.lax.top_k(jnp.where(below, index, NO_NODE), most)
    return jnp.maximum(nodes, 0), nodes >= 0


def _find_left(structure, parents, max_depth):
    """Nodes of a chain, [B, rows, X], and which of them went on from the state of each row's node.

    A step that went back to a state of the path may be repeated: it is how one gets there again.
    """
    path = _list_chain(structure, parents, max_depth)
    batch, nodes = jnp.arange(path.shape[0])[:, None, None], jnp.maximum(path, 0)
    keys = structure.state_key[batch, nodes]
    here = jnp.take_along_axis(structure.state_key, parents, 1)[..., None]
    before = structure.state_key[batch, jnp.maximum(structure.parent[batch, nodes], 0)]
    nearer_root = jnp.triu(jnp.ones((path.shape[-1],) * 2, bool), 1)
    seen = (keys[..., None] == keys[..., None, :]) & nearer_root
    back = seen.any(-1) & (keys != 0)
    return nodes, (path > 0) & (before == here) & ~back


def _list_chain(structure, parents, max_depth):
    """The nodes of the chain up to each row's node, [B, rows, X], the newest first, NO_NODE where
    there is none. Where a structure is one chain, steps that were refused are among them."""
    if parents.shape[1] > 1:
        # A node that can grow has at most max_depth - 1 steps behind it, and the root.
        return paths_up(structure, parents, max_depth)
    index = jnp.arange(structure.capacity)
    refused = ~structure.alive & (index < structure.num_nodes[:, None])
    return jnp.where((index <= parents) | refused, index, NO_NODE)[:, None, ::-1]


def _check(lm, cfg, world, steps, rows) -> Verdicts:
    """What the task says of the new steps."""
    states = jax.tree.map(rows.of_parent, world.task_state)
    return check_steps(
        cfg.task,
        lm.task_tables,
        states,
        steps.tokens,
        steps.length,
        steps.terminal,
        may_return=cfg.may_return,
        may_err=cfg.may_err,
    )


def _outcome(cfg, structure, request, steps, verdicts, judged, duplicate) -> Outcome:
    shape = duplicate.shape
    batch = shape[0]
    length = steps.length.reshape(batch, -1)
    cost = dataclasses.replace(
        zero_budget(structure.num_nodes),
        generated_tokens=length.sum(-1) + judged.rollout_tokens,
        forwarded_tokens=steps.forwarded_tokens.reshape(batch, -1).sum(-1) + judged.rollout_tokens,
        rollout_tokens=judged.rollout_tokens,
        scored_tokens=judged.scored_tokens,
        # A structure takes part in the calls up to its own longest step, not its neighbours'.
        model_calls=length.max(-1) + judged.model_calls,
        verifier_calls=verdicts.num_checks.reshape(batch, -1).sum(-1) + judged.verifier_calls,
        expansions=request.grows.sum(-1).astype(jnp.int32),
    )
    dropped = verdicts.illegal & cfg.drop_illegal
    return Outcome(
        valid=((steps.length > 0) & ~dropped).reshape(shape),
        duplicate=duplicate,
        length=steps.length.reshape(shape),
        logprob=steps.logprob.reshape(shape),
        value=judged.value.reshape(shape),
        reward=jnp.where(verdicts.solved, cfg.solved_reward, 0.0).reshape(shape),
        terminal=verdicts.terminal.reshape(shape),
        answer_key=stated_answers(steps, verdicts).reshape(shape),
        state_key=verdicts.state_key.reshape(shape),
        proven=verdicts.solved.reshape(shape),
        node_value=judged.node_value.reshape(shape[:2]),
        cost=cost,
    )


def _store(world, structure, rows, slots, steps, verdicts, ahead, keep) -> World:
    """Writes what the new nodes say under their indices.

    Args:
      ahead: what was read of the states one step on from them; None if nothing was.
    """
    batch = slots.shape[0]
    flat = slots.reshape(batch, -1)
    index = jnp.arange(batch)[:, None]

    def put(array: Array, values: Array) -> Array:
        values = values.reshape(*flat.shape, *values.shape[1:])
        return array.at[index, flat].set(values, mode="drop")

    known = world.ahead
    if known is not None:
        new = UNREAD if ahead is None else ahead.reshape(*flat.shape, -1)
        known = known.at[index, flat].set(new, mode="drop")
    pages = write_steps(
        world.pages,
        steps.caches,
        parents=rows.parents,
        slots=flat,
        starts=rows.step_starts(structure).reshape(flat.shape),
        lengths=steps.length.reshape(flat.shape),
        keep=keep.reshape(flat.shape),
    )
    return dataclasses.replace(
        world,
        pages=pages,
        tokens=put(world.tokens, steps.tokens),
        hidden=put(world.hidden, steps.hidden),
        path_logprob=put(world.path_logprob, rows.of_parent(world.path_logprob) + steps.logprob),
        path_confidence=put(
            world.path_confidence, rows.of_parent(world.path_confidence) + steps.confidence
        ),
        path_uncertainty=jax.tree.map(
            put,
            world.path_uncertainty,
            rows.add_to_parents(world.path_uncertainty, steps.uncertainty),
        ),
        token_logprobs=jax.tree.map(put, world.token_logprobs, steps.token_logprobs),
        answers=jax.tree.map(put, world.answers, steps.answers),
        task_state=jax.tree.map(put, world.task_state, verdicts.state),
        ahead=known,
    )
