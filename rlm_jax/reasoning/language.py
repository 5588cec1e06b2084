"""The only file of this room that knows language models: policy as expander, value as evaluator.

`begin` prefills the prompts and makes the structures; `make_expand` gives the expander that both
drivers run. The world it carries holds, under the structure's own indices, each node's KV pages,
tokens, last hidden state, path statistics and stated answer. Expanding a node forwards each new
token once and nothing else.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import zero_budget
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, Key, PyTree
from rlm_jax.inference.attention import Context
from rlm_jax.inference.decode import DecodedSteps, decode_steps
from rlm_jax.inference.extend import extend, last_hidden
from rlm_jax.inference.pages import (
    KVPages,
    count_pages,
    gather_paths,
    gather_prompts,
    keep_pages,
    make_pages,
    pages_for_search,
    path_buckets,
    release_pages,
    write_prompts,
    write_steps,
)
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params
from rlm_jax.reasoning.language_values import EVALUATORS, Judge, Paths, ValueFn, evaluate_paths
from rlm_jax.reasoning.operators.evaluate import AGGREGATIONS
from rlm_jax.reasoning.operators.structure import child_numbers, child_slots, take_nodes
from rlm_jax.reasoning.protocol import JUDGEMENTS, Expand, Outcome, Request
from rlm_jax.reasoning.structure import NO_NODE, UNLIMITED, Structure, make_structure, tokens_left
from rlm_jax.text.answers import AnswerRule, AnswerState, answer_key, init_answer_state
from rlm_jax.text.steps import StepRule


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """What is fixed at compile time.

    max_depth: steps of the longest path. num_nodes: capacity N. max_new_tokens: most tokens a
    structure may generate (its own limit may be lower). page_tokens: tokens of a KV page.
    evaluator, aggregate: see `language_values.py` and `accumulate_score`. judge: new steps are
    judged at "expansion", or requested nodes on "visit".
    value_fn: for evaluator "value_head": (head parameters, hidden [..., D]) -> values [...].
    """

    model: ModelConfig
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    evaluator: str = "confidence"
    aggregate: str = "last"
    judge: str = "expansion"
    num_nodes: int = 65
    max_depth: int = 16
    max_new_tokens: int = 2048
    page_tokens: int = 8
    value_fn: ValueFn | None = None

    def __post_init__(self):
        if self.evaluator not in EVALUATORS:
            raise ValueError(f"evaluator {self.evaluator!r}: accepted are {EVALUATORS}")
        if self.aggregate not in AGGREGATIONS:
            raise ValueError(f"aggregate {self.aggregate!r}: accepted are {AGGREGATIONS}")
        if self.judge not in JUDGEMENTS:
            raise ValueError(f"judge {self.judge!r}: accepted are {JUDGEMENTS}")
        if (self.evaluator == "value_head") != (self.value_fn is not None):
            raise ValueError(f"evaluator {self.evaluator!r} with value_fn={self.value_fn}")
        for name in ("num_nodes", "max_depth", "max_new_tokens", "page_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@struct
class LanguageModel:
    """Everything the expander computes with: the `params` of both drivers."""

    policy: Params
    step_rule: StepRule
    answer_rule: AnswerRule
    value_head: PyTree = None
    judge: Judge | None = None


@struct
class World:
    """What the nodes say, under their indices.

    tokens: [B, N, S], 0 behind a step's end. hidden: the state after each node's last token.
    path_logprob, path_confidence: sums over the generated tokens of the path. answers: what the
    path has stated. prompt_length: tokens of the problem's prompt.
    """

    pages: KVPages
    tokens: Int32[Array, "B N S"]
    hidden: Float[Array, "B N D"]
    path_logprob: Float32[Array, "B N"]
    path_confidence: Float32[Array, "B N"]
    answers: AnswerState
    prompt_length: Int32[Array, "B"]


def step_slots(rule: StepRule, page_tokens: int) -> int:
    """S: room for the longest step, a whole number of pages."""
    return count_pages(rule.max_tokens, page_tokens) * page_tokens


def begin(
    lm: LanguageModel,
    prompts: Int32[Array, "B T"],
    lengths: Int32[Array, "B"],
    token_limits: Int32[Array, "B"] | int = UNLIMITED,
    *,
    cfg: LanguageConfig,
) -> tuple[Structure, World]:
    """Prefills right-padded prompts and makes the structures and the world of a search.

    Args:
      prompts: T is a whole number of pages. token_limits: generated tokens allowed per structure,
        at most cfg.max_new_tokens.

    Raises:
      ValueError: T is not a whole number of pages.
    """
    structure, world = make_world(lm, lengths, prompts.shape[1], cfg=cfg)
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return admit(lm, structure, world, rows, prompts, lengths, token_limits, cfg=cfg)


def make_world(
    lm: LanguageModel, like: Int32[Array, "B"], width: int, *, cfg: LanguageConfig
) -> tuple[Structure, World]:
    """B structures without a problem, and room for prompts of up to `width` tokens.

    Args:
      like: arrays derive from it, to vary over a mesh as it does; its values play no part.

    Raises:
      ValueError: width is not a whole number of pages.
    """
    if width % cfg.page_tokens:
        raise ValueError(f"prompt width {width} is no multiple of page_tokens={cfg.page_tokens}")
    slots = step_slots(lm.step_rule, cfg.page_tokens)
    none = like * 0
    structure = make_structure(none, cfg.num_nodes, token_limit=0)
    dtype = lm.policy.final_norm.dtype
    pages = make_pages(
        cfg.model,
        none,
        num_nodes=cfg.num_nodes,
        num_pages=pages_for_search(
            width, cfg.num_nodes, slots, cfg.max_new_tokens, cfg.page_tokens
        ),
        num_prompt_pages=width // cfg.page_tokens,
        num_path_pages=_path_pages(slots, cfg),
        page_tokens=cfg.page_tokens,
        dtype=dtype,
    )
    zero = structure.value * 0
    size = cfg.model.model_dim
    return structure, World(
        pages=pages,
        tokens=jnp.broadcast_to(structure.depth[..., None] * 0, (*zero.shape, slots)),
        hidden=jnp.broadcast_to(zero[..., None], (*zero.shape, size)).astype(dtype),
        path_logprob=zero,
        path_confidence=zero + 0,
        answers=_state_nothing(structure.depth),
        prompt_length=none,
    )


def admit(
    lm: LanguageModel,
    structure: Structure,
    world: World,
    rows: Int32[Array, "F"],
    prompts: Int32[Array, "F T"],
    lengths: Int32[Array, "F"],
    token_limits: Int32[Array, "F"] | int = UNLIMITED,
    *,
    cfg: LanguageConfig,
) -> tuple[Structure, World]:
    """Prefills F right-padded prompts and gives them rows of the batch; what stood there is gone.

    Args:
      rows: B leaves a prompt out. T: the `width` of `make_world`.
    """
    limits = jnp.minimum(token_limits, cfg.max_new_tokens) + lengths * 0
    fresh = make_structure(
        lengths,
        cfg.num_nodes,
        num_parents=structure.more_parents.shape[-1] + 1,
        token_limit=limits,
    )
    cost = dataclasses.replace(
        zero_budget(lengths), prefilled_tokens=lengths, model_calls=jnp.ones_like(lengths)
    )
    fresh = dataclasses.replace(fresh, budget=cost)
    done = extend(lm.policy, prompts, lengths, cfg=cfg.model)
    last = last_hidden(done.hidden, lengths)

    def put(array: Array, new: Array) -> Array:
        return array.at[rows].set(new, mode="drop")

    world = World(
        pages=write_prompts(world.pages, rows, done.keys, done.values, lengths),
        tokens=world.tokens,
        hidden=world.hidden.at[rows, 0].set(last, mode="drop"),
        path_logprob=put(world.path_logprob, fresh.value),
        path_confidence=put(world.path_confidence, fresh.value),
        answers=jax.tree.map(put, world.answers, _state_nothing(fresh.depth)),
        prompt_length=put(world.prompt_length, lengths),
    )
    return jax.tree.map(put, structure, fresh), world


def _state_nothing(like: Int32[Array, "B N"]) -> AnswerState:
    """The answer state of nodes that have stated nothing yet."""
    answers = init_answer_state(like.reshape(-1))
    return jax.tree.map(lambda array: array.reshape(*like.shape, *array.shape[1:]), answers)


def keep_world(world: World, nodes: Int32[Array, "B"], order: Int32[Array, "B N"]) -> World:
    """Follows `operators.structure.keep_subtree`: pages, tokens and all move with their nodes."""
    return World(
        pages=keep_pages(world.pages, nodes, order),
        tokens=take_nodes(world.tokens, order),
        hidden=take_nodes(world.hidden, order),
        path_logprob=take_nodes(world.path_logprob, order),
        path_confidence=take_nodes(world.path_confidence, order),
        answers=jax.tree.map(lambda array: take_nodes(array, order), world.answers),
        prompt_length=world.prompt_length,
    )


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
        rows = _Rows(lanes, request.num_children)
        pages = release_pages(world.pages, structure.alive)
        world = dataclasses.replace(world, pages=pages)
        prompts = gather_prompts(world.pages)

        def grow(num_pages: int) -> tuple[DecodedSteps, _Judged]:
            contexts = (prompts, gather_paths(world.pages, lanes, num_pages))
            steps = _decode(lm, cfg, keys, world, structure, request, rows, contexts)
            return steps, _evaluate(lm, cfg, world, structure, request, steps, rows, contexts)

        # Attention costs what its keys measure: deep paths alone pay for long ones.
        buckets = path_buckets(world.pages)
        longest = jnp.take_along_axis(world.pages.table_length, lanes, 1).max()
        branch = (longest > jnp.asarray(buckets[:-1], jnp.int32)).sum()
        grow_fns = [functools.partial(grow, num_pages) for num_pages in buckets]
        steps, judged = jax.lax.switch(branch, grow_fns)
        duplicate = jnp.zeros(slots.shape, bool)
        if request.distinct:
            duplicate = _find_duplicates(world, structure, request, steps, slots.shape)
        outcome = _outcome(structure, request, steps, judged, duplicate, slots.shape)
        keep = outcome.valid & ~duplicate
        return outcome, _store(world, structure, rows, slots, steps, keep)

    return expand


class _Rows:
    """Takes per-node arrays [B, N, ...] to decoding rows [B*W*K, ...]: parents repeated K times."""

    def __init__(self, lanes: Int32[Array, "B W"], num_children: int):
        batch, num_lanes = lanes.shape
        self.parents = jnp.repeat(lanes, num_children, axis=1)
        self.structure = jnp.repeat(jnp.arange(batch), num_lanes * num_children)

    def of_parent(self, array: Array) -> Array:
        return array[self.structure, self.parents.reshape(-1)]

    def step_starts(self, structure: Structure) -> Int32[Array, "R"]:
        """Position of each row's first new token."""
        return self.of_parent(structure.span_start + structure.span_length)


def _path_pages(slots: int, cfg: LanguageConfig) -> int:
    """Pages of the longest path: every step full, or the whole budget on one path."""
    full = cfg.max_depth * (slots // cfg.page_tokens)
    return min(full, count_pages(cfg.max_new_tokens, cfg.page_tokens) + cfg.max_depth)


def _row_limits(structure, request, starts, rule, cfg):
    """Most tokens each row may take: the step's, the budget's even share, the context's room."""
    rows = request.grows.sum(-1) * request.num_children
    share = tokens_left(structure) // jnp.maximum(rows, 1)
    active = jnp.repeat(request.grows, request.num_children, axis=1)
    limit = jnp.minimum(jnp.where(active, share[:, None], 0), rule.max_tokens).reshape(-1)
    return jnp.clip(cfg.model.context_length - starts, 0, limit)


def _find_duplicates(world, structure, request, steps, shape) -> Bool[Array, "B W K"]:
    """Steps that equal an earlier step from the same node, of this request or of one before."""
    batch, num_lanes, num_children = shape
    tokens = steps.tokens.reshape(batch, num_lanes * num_children, -1)
    length = steps.length.reshape(batch, -1)
    parent = jnp.repeat(request.nodes, num_children, axis=1)

    def equal(other_tokens, other_length, other_parent):
        same = (tokens[:, :, None] == other_tokens[:, None]).all(-1)
        same &= length[:, :, None] == other_length[:, None]
        return same & (parent[:, :, None] == other_parent[:, None])

    earlier = jnp.tril(jnp.ones((parent.shape[1],) * 2, bool), -1)
    found = (equal(tokens, length, parent) & earlier).any(-1)
    # A node grown once more (a root sampled anew) has older children.
    living = jnp.where(structure.alive, structure.parent, NO_NODE - 1)
    again = (request.nodes[:, :, None] == living[:, None]) & request.grows[:, :, None]

    def look_back():
        return equal(world.tokens, structure.span_length, living).any(-1)

    found |= jax.lax.cond(again.any(), look_back, lambda: jnp.zeros_like(found))
    return (found & (length > 0)).reshape(shape)


@struct
class _Judged:
    """Values of new steps [R] and of requested nodes [B * W], and the tokens forwarded for them."""

    value: Float32[Array, "R"]
    node_value: Float32[Array, "Q"]
    scored_tokens: Int32[Array, "B"]


def _decode(lm, cfg, keys, world, structure, request, rows, contexts) -> DecodedSteps:
    """One step for every row of the request."""
    numbers = child_numbers(structure, request)
    starts = rows.step_starts(structure)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    return decode_steps(
        lm.policy,
        fold(keys, numbers.reshape(numbers.shape[0], -1)).reshape(-1),
        rows.of_parent(world.hidden),
        jax.tree.map(rows.of_parent, world.answers),
        cfg=cfg.model,
        contexts=contexts,
        starts=starts,
        limits=_row_limits(structure, request, starts, lm.step_rule, cfg),
        rule=lm.step_rule,
        answer_rule=lm.answer_rule,
        sampling=cfg.sampling,
        num_siblings=request.num_children,
        num_slots=world.tokens.shape[-1],
    )


def _evaluate(lm, cfg, world, structure, request, steps, rows, contexts) -> _Judged:
    """Values of the new steps, or of the requested nodes, by the evaluator of `cfg`."""
    batch = structure.depth.shape[0]
    settings = {
        "model": cfg.model,
        "evaluator": cfg.evaluator,
        "aggregate": cfg.aggregate,
        "value_fn": cfg.value_fn,
    }
    zero = jnp.zeros_like
    if cfg.judge == "visit":
        paths = _paths_of_nodes(world, structure, request)
        value, scored = evaluate_paths(
            lm.policy, lm.value_head, lm.judge, paths, structure, contexts, **settings
        )
        return _Judged(zero(steps.logprob), value, scored.reshape(batch, -1).sum(-1))
    paths = _paths_of_steps(world, structure, steps, rows)
    offset = jnp.arange(steps.tokens.shape[1], dtype=jnp.int32)[None]
    own = Context(
        keys=steps.keys,
        values=steps.values,
        positions=rows.step_starts(structure)[:, None] + offset,
        valid=offset < steps.length[:, None],
    )
    value, scored = evaluate_paths(
        lm.policy, lm.value_head, lm.judge, paths, structure, (*contexts, own), **settings
    )
    known = jnp.take_along_axis(structure.model_value, jnp.maximum(request.nodes, 0), 1)
    return _Judged(value, known.reshape(-1), scored.reshape(batch, -1).sum(-1))


def _paths_of_steps(world, structure, steps, rows) -> Paths:
    """The paths that end with the new steps."""
    ends = rows.step_starts(structure) + steps.length
    return Paths(
        logprob=rows.of_parent(world.path_logprob) + steps.logprob,
        confidence=rows.of_parent(world.path_confidence) + steps.confidence,
        num_tokens=ends - world.prompt_length[rows.structure],
        hidden=steps.hidden,
        terminal=steps.terminal,
        answer_key=answer_key(steps.answers),
        depth=rows.of_parent(structure.depth) + 1,
        above=rows.of_parent(structure.model_value),
        ends=ends,
        fresh=steps.length > 0,
    )


def _paths_of_nodes(world, structure, request) -> Paths:
    """The paths that end with the requested nodes."""
    index = jnp.arange(request.nodes.shape[0])[:, None]
    nodes = jnp.maximum(request.nodes, 0)

    def take(array):
        return array[index, nodes].reshape(-1, *array.shape[2:])

    ends = structure.span_start + structure.span_length
    above = structure.model_value[index, jnp.maximum(structure.parent, 0)]
    return Paths(
        logprob=take(world.path_logprob),
        confidence=take(world.path_confidence),
        num_tokens=take(ends - world.prompt_length[:, None]),
        hidden=take(world.hidden),
        terminal=take(structure.terminal),
        answer_key=take(structure.answer_key),
        depth=take(structure.depth),
        above=take(above),
        ends=take(ends),
        fresh=request.active.reshape(-1),
    )


def _outcome(structure, request, steps, judged, duplicate, shape) -> Outcome:
    batch = shape[0]
    length = steps.length.reshape(batch, -1)
    cost = dataclasses.replace(
        zero_budget(structure.num_nodes),
        generated_tokens=length.sum(-1),
        scored_tokens=judged.scored_tokens,
        # A structure takes part in the calls up to its own longest step, not its neighbours'.
        model_calls=length.max(-1) + (judged.scored_tokens > 0),
        expansions=request.grows.sum(-1).astype(jnp.int32),
    )
    none = jnp.zeros(shape, bool)
    return Outcome(
        valid=(steps.length > 0).reshape(shape),
        duplicate=duplicate,
        length=steps.length.reshape(shape),
        logprob=steps.logprob.reshape(shape),
        value=judged.value.reshape(shape),
        reward=jnp.zeros(shape, jnp.float32),
        terminal=steps.terminal.reshape(shape),
        answer_key=answer_key(steps.answers).reshape(shape),
        state_key=none.astype(jnp.uint32),
        proven=none,
        node_value=judged.node_value.reshape(shape[:2]),
        cost=cost,
    )


def _store(world, structure, rows, slots, steps, keep) -> World:
    """Writes what the new nodes say under their indices."""
    batch = slots.shape[0]
    flat = slots.reshape(batch, -1)
    index = jnp.arange(batch)[:, None]

    def put(array: Array, values: Array) -> Array:
        values = values.reshape(*flat.shape, *values.shape[1:])
        return array.at[index, flat].set(values, mode="drop")

    pages = write_steps(
        world.pages,
        steps.keys,
        steps.values,
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
        answers=jax.tree.map(put, world.answers, steps.answers),
    )
