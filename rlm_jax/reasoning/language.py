"""The only file of this room that knows language models: policy as expander, value as evaluator.

`begin` prefills the prompts and makes the structures; `make_expand` gives the expander that both
drivers run. The world it carries holds, under the structure's own indices, each node's KV pages,
tokens, last hidden state, path statistics and stated answer. Expanding a node forwards each new
token once and nothing else.

Evaluators (Blueprint 4.3.4), all in [0, 1] but for a value head of another range:
  confidence  mean token confidence of the path (Marco-o1, arXiv 2411.14405; spec B12.10)
  likelihood  exp of the path's mean token log-probability
  consistency the share of the structure's finished solutions that state the same answer (rStar's
              terminal reward, arXiv 2408.06195); an unfinished path is worth 0 until one finishes
  p_yes       the policy's own P(yes) when asked whether the reasoning so far is right
  value_head  a value head on the state after the step (spec B3)
  none        0
A score of p_yes or value_head judges one step; `aggregate` makes the path's value of them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import zero_budget
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, Key, PyTree
from rlm_jax.inference.attention import Context
from rlm_jax.inference.decode import DecodedSteps, decode_steps
from rlm_jax.inference.extend import extend, last_hidden, yes_probability
from rlm_jax.inference.pages import (
    KVPages,
    count_pages,
    gather_paths,
    gather_prompts,
    make_pages,
    pages_for_search,
    path_buckets,
    write_prompts,
    write_steps,
)
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params
from rlm_jax.reasoning.operators.evaluate import (
    AGGREGATIONS,
    accumulate_score,
    self_consistency,
)
from rlm_jax.reasoning.operators.structure import child_slots
from rlm_jax.reasoning.protocol import Expand, Outcome, Request
from rlm_jax.reasoning.structure import UNLIMITED, Structure, make_structure, tokens_left
from rlm_jax.text.answers import AnswerRule, AnswerState, answer_key, init_answer_state
from rlm_jax.text.steps import StepRule

EVALUATORS = ("confidence", "likelihood", "consistency", "p_yes", "value_head", "none")
ValueFn = Callable[[PyTree, Array], Array]


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """What is fixed at compile time.

    max_depth: steps of the longest path. num_nodes: capacity N. max_new_tokens: most tokens a
    structure may generate (its own limit may be lower). page_tokens: tokens of a KV page.
    aggregate: how per-step scores make a path's value, see `accumulate_score`.
    value_fn: for evaluator "value_head": (head parameters, hidden [..., D]) -> values [...].
    """

    model: ModelConfig
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    evaluator: str = "confidence"
    aggregate: str = "last"
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
        if (self.evaluator == "value_head") != (self.value_fn is not None):
            raise ValueError(f"evaluator {self.evaluator!r} with value_fn={self.value_fn}")
        for name in ("num_nodes", "max_depth", "max_new_tokens", "page_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@struct
class Judge:
    """The question behind evaluator "p_yes", as token ids.

    unfinished, finished: what follows a step that did not, or did, end the solution, [J] right
    padded; the lengths; yes_ids, no_ids: the tokens that say so.
    """

    unfinished: Int32[Array, "J"]
    finished: Int32[Array, "J"]
    unfinished_length: Int32[Array, ""]
    finished_length: Int32[Array, ""]
    yes_ids: Int32[Array, "Y"]
    no_ids: Int32[Array, "Z"]


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
    path has stated.
    """

    pages: KVPages
    tokens: Int32[Array, "B N S"]
    hidden: Float[Array, "B N D"]
    path_logprob: Float32[Array, "B N"]
    path_confidence: Float32[Array, "B N"]
    answers: AnswerState


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
    batch, width = prompts.shape
    if width % cfg.page_tokens:
        raise ValueError(f"prompt width {width} is no multiple of page_tokens={cfg.page_tokens}")
    slots = step_slots(lm.step_rule, cfg.page_tokens)
    limits = jnp.minimum(token_limits, cfg.max_new_tokens) + lengths * 0
    structure = make_structure(lengths, cfg.num_nodes, token_limit=limits)
    cost = dataclasses.replace(
        zero_budget(lengths), prefilled_tokens=lengths, model_calls=jnp.ones_like(lengths)
    )
    structure = dataclasses.replace(structure, budget=cost)
    prefilled = extend(lm.policy, prompts, lengths, cfg=cfg.model)
    pages = make_pages(
        cfg.model,
        lengths,
        num_nodes=cfg.num_nodes,
        num_pages=pages_for_search(width, cfg.num_nodes, cfg.max_new_tokens, cfg.page_tokens),
        num_prompt_pages=width // cfg.page_tokens,
        num_path_pages=_path_pages(slots, cfg),
        page_tokens=cfg.page_tokens,
        dtype=prefilled.hidden.dtype,
    )
    pages = write_prompts(pages, prefilled.keys, prefilled.values, lengths)
    last = last_hidden(prefilled.hidden, lengths)
    zero = jnp.zeros_like(structure.value)
    answers = init_answer_state(structure.depth.reshape(-1))
    world = World(
        pages=pages,
        tokens=jnp.broadcast_to(structure.depth[..., None] * 0, (batch, cfg.num_nodes, slots)),
        hidden=jnp.broadcast_to(last[:, None] * 0, (batch, cfg.num_nodes, last.shape[-1]))
        .at[:, 0]
        .set(last),
        path_logprob=zero,
        path_confidence=zero,
        answers=jax.tree.map(lambda a: a.reshape(*zero.shape, *a.shape[1:]), answers),
    )
    return structure, world


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
        prompts = gather_prompts(world.pages)

        def grow(num_pages: int) -> tuple[DecodedSteps, _Judged]:
            contexts = (prompts, gather_paths(world.pages, lanes, num_pages))
            steps = _decode(lm, cfg, keys, world, structure, request, slots, rows, contexts)
            return steps, _evaluate(lm, cfg, world, structure, steps, rows, contexts)

        # Attention costs what its keys measure: deep paths alone pay for long ones.
        buckets = path_buckets(world.pages)
        longest = jnp.take_along_axis(world.pages.table_length, lanes, 1).max()
        branch = (longest > jnp.asarray(buckets[:-1], jnp.int32)).sum()
        grow_fns = [functools.partial(grow, num_pages) for num_pages in buckets]
        steps, judged = jax.lax.switch(branch, grow_fns)
        duplicate = _find_duplicates(steps, slots.shape)
        outcome = _outcome(structure, request, steps, judged, duplicate, slots.shape)
        keep = outcome.valid & ~duplicate
        return outcome, _store(world, structure, rows, slots, steps, judged, keep)

    return expand


class _Rows:
    """Takes per-node arrays [B, N, ...] to decoding rows [B*W*K, ...]: parents repeated K times."""

    def __init__(self, lanes: Int32[Array, "B W"], num_children: int):
        batch, num_lanes = lanes.shape
        self.parents = jnp.repeat(lanes, num_children, axis=1)
        self.structure = jnp.repeat(jnp.arange(batch), num_lanes * num_children)

    def of_parent(self, array: Array) -> Array:
        return array[self.structure, self.parents.reshape(-1)]

    def of_root(self, array: Array) -> Array:
        return array[self.structure, 0]

    def step_starts(self, structure: Structure) -> Int32[Array, "R"]:
        """Position of each row's first new token."""
        return self.of_parent(structure.span_start + structure.span_length)


def _path_pages(slots: int, cfg: LanguageConfig) -> int:
    """Pages of the longest path: every step full, or the whole budget on one path."""
    full = cfg.max_depth * (slots // cfg.page_tokens)
    return min(full, count_pages(cfg.max_new_tokens, cfg.page_tokens) + cfg.max_depth)


def _row_limits(structure, request, starts, rule, cfg):
    """Most tokens each row may take: the step's, the budget's even share, the context's room."""
    rows = request.active.sum(-1) * request.num_children
    share = tokens_left(structure) // jnp.maximum(rows, 1)
    active = jnp.repeat(request.active, request.num_children, axis=1)
    limit = jnp.minimum(jnp.where(active, share[:, None], 0), rule.max_tokens).reshape(-1)
    return jnp.clip(cfg.model.context_length - starts, 0, limit)


def _find_duplicates(steps: DecodedSteps, shape: tuple[int, ...]) -> Bool[Array, "B W K"]:
    """Steps that equal an earlier sibling of the same request."""
    tokens = steps.tokens.reshape(*shape, -1)
    length = steps.length.reshape(shape)
    same = (tokens[..., :, None, :] == tokens[..., None, :, :]).all(-1)
    same &= length[..., :, None] == length[..., None, :]
    earlier = jnp.tril(jnp.ones(shape[-1:] * 2, bool), -1)
    return (same & earlier).any(-1) & (length > 0)


@struct
class _Judged:
    """Values of the new steps, what they rest on, and the tokens forwarded to get them."""

    value: Float32[Array, "R"]
    path_logprob: Float32[Array, "R"]
    path_confidence: Float32[Array, "R"]
    scored_tokens: Int32[Array, "R"]


def _decode(lm, cfg, keys, world, structure, request, slots, rows, contexts) -> DecodedSteps:
    """One step for every row of the request."""
    starts = rows.step_starts(structure)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    return decode_steps(
        lm.policy,
        fold(keys, slots.reshape(slots.shape[0], -1)).reshape(-1),
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


def _evaluate(lm, cfg, world, structure, steps, rows, contexts) -> _Judged:
    """Values of the new steps by the evaluator of `cfg`."""
    starts = rows.step_starts(structure)
    path_logprob = rows.of_parent(world.path_logprob) + steps.logprob
    path_confidence = rows.of_parent(world.path_confidence) + steps.confidence
    num_tokens = starts + steps.length - rows.of_root(structure.span_length)
    num_tokens = jnp.maximum(num_tokens, 1).astype(jnp.float32)
    scored = jnp.zeros_like(steps.length)
    if cfg.evaluator == "confidence":
        value = path_confidence / num_tokens
    elif cfg.evaluator == "likelihood":
        value = jnp.exp(path_logprob / num_tokens)
    elif cfg.evaluator == "consistency":
        value = _agreement(structure, steps)
    elif cfg.evaluator == "none":
        value = jnp.zeros_like(path_logprob)
    else:
        if cfg.evaluator == "p_yes":
            score, scored = _ask_judge(lm, cfg, steps, contexts, starts)
        else:
            assert cfg.value_fn is not None
            score = cfg.value_fn(lm.value_head, steps.hidden).astype(jnp.float32)
        depth = rows.of_parent(structure.depth) + 1
        above = rows.of_parent(structure.model_value)
        value = accumulate_score(above, score, depth, cfg.aggregate)
    return _Judged(value, path_logprob, path_confidence, scored)


def _agreement(structure: Structure, steps: DecodedSteps) -> Float32[Array, "R"]:
    """Self-consistency of the steps that ended a solution, themselves among the voters."""
    batch = structure.depth.shape[0]
    stated = answer_key(steps.answers).reshape(batch, -1)
    finished = steps.terminal.reshape(batch, -1)
    votes = jnp.concatenate([structure.answer_key, stated], 1)
    voters = jnp.concatenate([structure.terminal & structure.alive, finished], 1)
    share = self_consistency(stated, votes, voters)
    return jnp.where(finished, share, 0.0).reshape(-1)


def _ask_judge(lm, cfg, steps, contexts, starts) -> tuple[Array, Array]:
    """P(yes) to the judge's question, forwarded behind each new step, and the tokens it took."""
    judge = lm.judge
    if judge is None:
        raise ValueError("evaluator 'p_yes' needs LanguageModel.judge")
    offset = jnp.arange(steps.tokens.shape[1], dtype=jnp.int32)[None]
    own = Context(
        keys=steps.keys,
        values=steps.values,
        positions=starts[:, None] + offset,
        valid=offset < steps.length[:, None],
    )
    lengths = jnp.where(steps.terminal, judge.finished_length, judge.unfinished_length)
    lengths = jnp.where(steps.length > 0, lengths, 0)
    asked = extend(
        lm.policy,
        jnp.where(steps.terminal[:, None], judge.finished, judge.unfinished),
        lengths,
        cfg=cfg.model,
        contexts=(*contexts, own),
        starts=starts + steps.length,
    )
    hidden = last_hidden(asked.hidden, lengths)
    value = yes_probability(lm.policy, hidden, judge.yes_ids, judge.no_ids, cfg=cfg.model)
    return value, lengths


def _outcome(structure, request, steps, judged, duplicate, shape) -> Outcome:
    batch = shape[0]
    scored = judged.scored_tokens.reshape(batch, -1)
    cost = dataclasses.replace(
        zero_budget(structure.num_nodes),
        generated_tokens=steps.length.reshape(batch, -1).sum(-1),
        scored_tokens=scored.sum(-1),
        # A structure takes part in the calls up to its own longest step, not its neighbours'.
        model_calls=steps.length.reshape(batch, -1).max(-1) + (scored > 0).any(-1),
        expansions=request.active.sum(-1).astype(jnp.int32),
    )
    return Outcome(
        valid=(steps.length > 0).reshape(shape),
        duplicate=duplicate,
        length=steps.length.reshape(shape),
        logprob=steps.logprob.reshape(shape),
        value=judged.value.reshape(shape),
        reward=jnp.zeros(shape, jnp.float32),
        terminal=steps.terminal.reshape(shape),
        answer_key=answer_key(steps.answers).reshape(shape),
        cost=cost,
    )


def _store(world, structure, rows, slots, steps, judged, keep) -> World:
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
    return World(
        pages=pages,
        tokens=put(world.tokens, steps.tokens),
        hidden=put(world.hidden, steps.hidden),
        path_logprob=put(world.path_logprob, judged.path_logprob),
        path_confidence=put(world.path_confidence, judged.path_confidence),
        answers=jax.tree.map(put, world.answers, steps.answers),
    )
