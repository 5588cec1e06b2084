"""The world of a search over a language model: what the nodes say, and where problems enter it.

`begin` prefills prompts and makes the structures; `admit` hands rows of a running batch to new
problems. The world holds, under the structure's own indices, each node's KV pages, tokens, last
hidden state, path statistics, stated answer and, where the task checks steps, the task's state.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import zero_budget
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float, Float32, Int32, PyTree
from rlm_jax.inference.extend import extend, last_hidden
from rlm_jax.inference.pages import (
    KVPages,
    count_pages,
    keep_pages,
    make_pages,
    pages_for_search,
    write_prompts,
)
from rlm_jax.inference.sampling import SamplingConfig, Uncertainty
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params
from rlm_jax.models.state_value import StateValue
from rlm_jax.reasoning.language_lookahead import UNREAD
from rlm_jax.reasoning.language_task import begin_keys, begin_states, count_outcomes, empty_states
from rlm_jax.reasoning.language_values import (
    STEP_SCORES,
    Judge,
    ValueFn,
    looks_ahead,
    needs_uncertainty,
    parse_evaluator,
)
from rlm_jax.reasoning.operators.evaluate import AGGREGATIONS, MIXTURES
from rlm_jax.reasoning.operators.structure import take_nodes
from rlm_jax.reasoning.protocol import JUDGEMENTS
from rlm_jax.reasoning.structure import UNLIMITED, Structure, make_structure
from rlm_jax.tasks.device import DeviceTask
from rlm_jax.text.answers import AnswerRule, AnswerState, init_answer_state
from rlm_jax.text.steps import StepRule


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """What is fixed at compile time.

    max_depth: steps of the longest path. num_nodes: capacity N. max_new_tokens: most tokens a
    structure may generate (its own limit may be lower). page_tokens: tokens of a KV page.
    evaluator, aggregate: see `language_values.py` and `accumulate_score`. mixture: how several
    evaluators make one value, see `mix_values`. judge: new steps are judged at "expansion", or
    requested nodes on "visit".
    num_rollouts, rollout_tokens, rollout_discount: for evaluator "rollout": how many of each path,
    the most tokens of one, and what a step of one discounts its value by.
    value_fn: for evaluator "value_head": (head parameters, hidden [..., D]) -> values [...].
    task: checks every step against the problem alone (`language_task.py`); None checks nothing.
    dead_value: what the steps it refutes are worth. drop_illegal: steps that do not follow become
    no nodes of the search; what they cost stays counted. may_return: a step may take earlier ones
    back, as a chain does; a tree goes back by itself, and there such steps are illegal. may_err: a
    step that does not follow, but says what it leaves, is gone on from as if that was so; what it
    proves is nothing.
    solved_reward: reward of the edge into a proven solution, whose value is 1 already.
    keeps_subtrees: pages for a path above the root too, which `keep_world` needs.
    """

    model: ModelConfig
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    evaluator: str = "confidence"
    aggregate: str = "last"
    mixture: str = "mean"
    judge: str = "expansion"
    num_nodes: int = 65
    max_depth: int = 16
    max_new_tokens: int = 2048
    page_tokens: int = 8
    num_rollouts: int = 4
    rollout_tokens: int = 64
    rollout_discount: float = 1.0
    value_fn: ValueFn | None = None
    task: DeviceTask | None = None
    dead_value: float = 0.0
    drop_illegal: bool = True
    may_return: bool = False
    may_err: bool = False
    solved_reward: float = 0.0
    keeps_subtrees: bool = False

    def __post_init__(self):
        weights = parse_evaluator(self.evaluator)
        if self.aggregate not in AGGREGATIONS:
            raise ValueError(f"aggregate {self.aggregate!r}: accepted are {AGGREGATIONS}")
        if self.judge not in JUDGEMENTS:
            raise ValueError(f"judge {self.judge!r}: accepted are {JUDGEMENTS}")
        if self.mixture not in MIXTURES:
            raise ValueError(f"mixture {self.mixture!r}: accepted are {MIXTURES}")
        if len(weights) > 1 and self.aggregate != "last" and set(weights) & set(STEP_SCORES):
            raise ValueError(
                f"aggregate {self.aggregate!r} of the mixture {self.evaluator!r}: accepted is last"
            )
        if self.aggregate != "last" and not set(weights) & set(STEP_SCORES):
            raise ValueError(
                f"aggregate {self.aggregate!r} of evaluator {self.evaluator!r}: accepted is "
                f"last, as it judges no steps ({', '.join(STEP_SCORES)} do)"
            )
        if ("value_head" in weights) != (self.value_fn is not None):
            raise ValueError(f"evaluator {self.evaluator!r} with value_fn={self.value_fn}")
        sizes = ("num_nodes", "max_depth", "max_new_tokens", "page_tokens")
        for name in (*sizes, "num_rollouts", "rollout_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.rollout_discount <= 1:
            raise ValueError(f"rollout_discount must be in [0, 1], got {self.rollout_discount}")

    @property
    def looks_ahead(self) -> bool:
        """Whether states one step on are read, to judge states or to weigh steps."""
        return bool(self.sampling.outcome_weight) or looks_ahead(self.evaluator)


@struct
class LanguageModel:
    """Everything the expander computes with: the `params` of both drivers.

    task_tables: what `LanguageConfig.task` made of the vocabulary. state_value: for evaluators
    that ask it (`language_values.STATE_JUDGES`), which need a task that says what its states are.
    """

    policy: Params
    step_rule: StepRule
    answer_rule: AnswerRule
    value_head: PyTree = None
    judge: Judge | None = None
    task_tables: PyTree = None
    state_value: StateValue | None = None


@struct
class World:
    """What the nodes say, under their indices.

    tokens: [B, N, S], 0 behind a step's end; of the root the end of the prompt where steps are held
    to it (`sampling.copy_returns`). hidden: the state after each node's last token.
    path_logprob, path_confidence: sums over the generated tokens of the path. answers: what the
    path has stated. prompt_length: tokens of the problem's prompt. task_state: the task's state
    behind each node, leaves [B, N, ...]; None without a task. path_uncertainty: a sum over the path
    like the others, [B, N]; None if no evaluator needs it. token_logprobs: of each token; None
    where steps may be repeated. ahead: what was read of the states one step on from each node
    (`language_lookahead.Ahead.value`); None if nothing looks ahead.
    """

    pages: KVPages
    tokens: Int32[Array, "B N S"]
    hidden: Float[Array, "B N D"]
    path_logprob: Float32[Array, "B N"]
    path_confidence: Float32[Array, "B N"]
    answers: AnswerState
    prompt_length: Int32[Array, "B"]
    task_state: PyTree = None
    path_uncertainty: Uncertainty | None = None
    token_logprobs: Float32[Array, "B N S"] | None = None
    ahead: Float32[Array, "B N M"] | None = None


class Rows:
    """Takes per-node arrays [B, N, ...] to decoding rows [B*W*K, ...]: parents repeated K times."""

    def __init__(self, lanes: Int32[Array, "B W"], num_children: int):
        batch, num_lanes = lanes.shape
        self.parents = jnp.repeat(lanes, num_children, axis=1)
        self.structure = jnp.repeat(jnp.arange(batch), num_lanes * num_children)

    def of_parent(self, array: Array) -> Array:
        return array[self.structure, self.parents.reshape(-1)]

    def add_to_parents(self, sums: PyTree, steps: PyTree) -> PyTree:
        """Sums over paths: the parents' [B, N], and what new steps [R] add to them."""
        return jax.tree.map(lambda above, new: self.of_parent(above) + new, sums, steps)

    def step_starts(self, structure: Structure) -> Int32[Array, "R"]:
        """Position of each row's first new token."""
        return self.of_parent(structure.span_start + structure.span_length)


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
    _, world = make_world(lm, lengths, prompts.shape[1], cfg=cfg)
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return _write_roots(lm, world, rows, prompts, lengths, token_limits, cfg=cfg)


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
    num_above = cfg.max_depth if cfg.keeps_subtrees else 0
    num_steps = cfg.num_nodes + num_above
    pages = make_pages(
        cfg.model,
        none,
        num_nodes=cfg.num_nodes,
        num_pages=pages_for_search(
            width, num_steps, slots, cfg.max_new_tokens + num_above * slots, cfg.page_tokens
        ),
        num_prompt_pages=width // cfg.page_tokens,
        num_path_pages=_path_pages(slots, cfg),
        page_tokens=cfg.page_tokens,
        dtype=dtype,
    )
    zero = structure.value * 0
    size = cfg.model.model_dim
    states = empty_states(cfg.task, lm.task_tables, width, structure.depth)
    return structure, World(
        pages=pages,
        tokens=jnp.broadcast_to(structure.depth[..., None] * 0, (*zero.shape, slots)),
        hidden=jnp.broadcast_to(zero[..., None], (*zero.shape, size)).astype(dtype),
        path_logprob=zero,
        path_confidence=zero + 0,
        answers=_state_nothing(structure.depth),
        prompt_length=none,
        task_state=states,
        path_uncertainty=Uncertainty(zero + 0, zero + 0)
        if needs_uncertainty(cfg.evaluator)
        else None,
        token_logprobs=jnp.broadcast_to(zero[..., None], (*zero.shape, slots))
        if cfg.sampling.no_repeats
        else None,
        ahead=zero[..., None] + jnp.full(count_outcomes(cfg.task, states), UNREAD)
        if cfg.looks_ahead
        else None,
    )


def admit(
    lm: LanguageModel,
    structure: Structure,
    world: World,
    rows: Int32[Array, "F"],
    prompts: Int32[Array, "F T"],
    lengths: Int32[Array, "F"],
    token_limits: Int32[Array, "F"] | int = UNLIMITED,
    expansion_limits: Int32[Array, "F"] | int = UNLIMITED,
    *,
    cfg: LanguageConfig,
) -> tuple[Structure, World]:
    """Prefills F right-padded prompts and gives them rows of the batch; what stood there is gone.

    Args:
      rows: B leaves a prompt out. T: the `width` of `make_world`. token_limits,
        expansion_limits: generated tokens and expansions allowed per structure.
    """
    fresh, world = _write_roots(
        lm,
        world,
        rows,
        prompts,
        lengths,
        token_limits,
        expansion_limits,
        num_parents=structure.more_parents.shape[-1] + 1,
        cfg=cfg,
    )

    def put(array: Array, new: Array) -> Array:
        return array.at[rows].set(new, mode="drop")

    world = dataclasses.replace(
        world,
        path_logprob=put(world.path_logprob, fresh.value),
        path_confidence=put(world.path_confidence, fresh.value),
        answers=jax.tree.map(put, world.answers, _state_nothing(fresh.depth)),
        path_uncertainty=jax.tree.map(lambda old: put(old, fresh.value), world.path_uncertainty),
        ahead=jax.tree.map(lambda old: old.at[rows].set(UNREAD, mode="drop"), world.ahead),
    )
    return jax.tree.map(put, structure, fresh), world


def _write_roots(
    lm: LanguageModel,
    world: World,
    rows: Int32[Array, "F"],
    prompts: Int32[Array, "F T"],
    lengths: Int32[Array, "F"],
    token_limits: Int32[Array, "F"] | int,
    expansion_limits: Int32[Array, "F"] | int = UNLIMITED,
    *,
    num_parents: int = 1,
    cfg: LanguageConfig,
) -> tuple[Structure, World]:
    """Structures of F prompts, and the world with what it says of their roots.

    What it says of other nodes is left to the caller: in an empty world there is nothing to do.
    """
    limits = jnp.minimum(token_limits, cfg.max_new_tokens) + lengths * 0
    fresh = make_structure(
        lengths,
        cfg.num_nodes,
        num_parents=num_parents,
        token_limit=limits,
        expansion_limit=expansion_limits,
    )
    cost = dataclasses.replace(
        zero_budget(lengths), prefilled_tokens=lengths, model_calls=jnp.ones_like(lengths)
    )
    done = extend(lm.policy, prompts, lengths, cfg=cfg.model)
    states = begin_states(cfg.task, lm.task_tables, prompts, lengths)
    key = begin_keys(cfg.task, states, lengths)
    fresh = dataclasses.replace(fresh, budget=cost, state_key=fresh.state_key.at[:, 0].set(key))

    def put_root(array: Array, new: Array) -> Array:
        return array.at[rows, 0].set(new, mode="drop")

    world = dataclasses.replace(
        world,
        pages=write_prompts(world.pages, rows, done.caches, lengths),
        tokens=_put_prompt_ends(world.tokens, rows, prompts, lengths)
        if cfg.sampling.copy_returns
        else world.tokens,
        hidden=put_root(world.hidden, last_hidden(done.hidden, lengths)),
        prompt_length=world.prompt_length.at[rows].set(lengths, mode="drop"),
        task_state=jax.tree.map(put_root, world.task_state, states),
    )
    return fresh, world


def _put_prompt_ends(
    tokens: Int32[Array, "B N S"],
    rows: Int32[Array, "F"],
    prompts: Int32[Array, "F T"],
    lengths: Int32[Array, "F"],
) -> Int32[Array, "B N S"]:
    """The last S tokens of each prompt, as its root's."""
    place = jnp.arange(tokens.shape[-1])
    first = jnp.maximum(lengths - tokens.shape[-1], 0)[:, None]
    inside = first + place < lengths[:, None]
    ends = jnp.take_along_axis(prompts, jnp.minimum(first + place, prompts.shape[1] - 1), 1)
    return tokens.at[rows, 0].set(jnp.where(inside, ends, 0), mode="drop")


def _state_nothing(like: Int32[Array, "B N"]) -> AnswerState:
    """The answer state of nodes that have stated nothing yet."""
    answers = init_answer_state(like.reshape(-1))
    return jax.tree.map(lambda array: array.reshape(*like.shape, *array.shape[1:]), answers)


def keep_world(
    world: World, nodes: Int32[Array, "B"], order: Int32[Array, "B N"], *, cfg: LanguageConfig
) -> World:
    """Follows `operators.structure.keep_subtree`: pages, tokens and all move with their nodes.

    Raises:
      ValueError: the world was made without room for what stands above a kept root.
    """
    if not cfg.keeps_subtrees:
        raise ValueError(
            "keeps_subtrees=False: accepted is True, as the root's own path takes pages"
        )
    return World(
        pages=keep_pages(world.pages, nodes, order),
        tokens=take_nodes(world.tokens, order),
        hidden=take_nodes(world.hidden, order),
        path_logprob=take_nodes(world.path_logprob, order),
        path_confidence=take_nodes(world.path_confidence, order),
        answers=jax.tree.map(lambda array: take_nodes(array, order), world.answers),
        prompt_length=world.prompt_length,
        task_state=jax.tree.map(lambda array: take_nodes(array, order), world.task_state),
        path_uncertainty=jax.tree.map(
            lambda array: take_nodes(array, order), world.path_uncertainty
        ),
        token_logprobs=jax.tree.map(lambda array: take_nodes(array, order), world.token_logprobs),
        ahead=jax.tree.map(lambda array: take_nodes(array, order), world.ahead),
    )


def _path_pages(slots: int, cfg: LanguageConfig) -> int:
    """Pages of the longest path: every step full, or the whole budget on one path."""
    full = cfg.max_depth * (slots // cfg.page_tokens)
    return min(full, count_pages(cfg.max_new_tokens, cfg.page_tokens) + cfg.max_depth)
