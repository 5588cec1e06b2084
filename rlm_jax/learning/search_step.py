"""Search inside the training step: problems in, better networks out, one compiled program.

    problems -> search with the current networks -> device verification -> targets -> replay
             -> losses -> updates

The one idea: the searches, their verdicts, the replay buffer and the updates are functions on one
device-resident state, so that nothing returns to the host between a problem and what was learned
from it. `collect` and `learn` are the two halves; `search_and_learn` is one after the other, and
two programs give the same state as one where a search is too large to share a program.

Papers: AlphaZero (1712.01815), Expert Iteration (1705.08439), Gumbel MuZero (Danihelka 2022) for
the improved policy; Blueprint 2501.11223, C.3 (phase 2). Deviation: the policy learns the search's
preferences over sampled steps, and the replay buffer holds finished rows instead of trees.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32, Key, PyTree
from rlm_jax.data.packing import TokenBatch
from rlm_jax.learning.collect import CollectConfig, collect_rows
from rlm_jax.learning.networks import Networks, assemble
from rlm_jax.learning.replay import Replay, add_rows, make_replay, sample_rows
from rlm_jax.learning.update import Loss, TrainState, sum_metrics, update_state
from rlm_jax.models.lora import LoraConfig
from rlm_jax.models.params import Params
from rlm_jax.reasoning.drive import Limits, run_compiled
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, begin, make_expand
from rlm_jax.reasoning.protocol import Keys, Strategy
from rlm_jax.reasoning.sharding import BATCH_SPEC, shard_search

Metrics = dict[str, MaskedSum]


@struct
class SearchState:
    """What search-training carries from step to step. key: of this step's sampling from replay."""

    train: TrainState
    replay: Replay
    key: Key[Array, ""]


@struct
class Collected:
    """New rows of B structures, and counts of each structure.

    teaches: rows that teach anything. solved: a right solution was found. solved_first: on the path
    that the improved policy likes best. generated_tokens, expansions: what the search took.
    """

    rows: TokenBatch
    teaches: Bool[Array, "rows"]
    solved: Bool[Array, "B"]
    generated_tokens: Int32[Array, "B"]
    expansions: Int32[Array, "B"]


@dataclasses.dataclass(frozen=True)
class SearchStepConfig:
    """batch_rows: rows of an update's batch. num_updates: updates after each search.
    replay_rows: of the buffer (of each shard).
    """

    batch_rows: int = 256
    num_updates: int = 2
    replay_rows: int = 8192

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be >= 1, got {getattr(self, field.name)}")


Collect = Callable[[Networks, Keys, Array, Array], Collected]


def make_collect(
    rules: LanguageModel,
    *,
    language: LanguageConfig,
    strategy: Strategy,
    cfg: CollectConfig,
    budget_tokens: int,
    mesh: Mesh | None = None,
) -> Collect:
    """`collect(networks, keys [B], prompts [B, T], lengths [B]) -> Collected`.

    Args:
      rules: a language model whose networks are replaced by those that learn.
      mesh: the batch is split over its axes, without a collective.

    Raises:
      ValueError: `language` has no task to verify with.
    """
    if language.task is None:
        raise ValueError("search training needs a task that verifies on the device")
    expand = make_expand(language)
    limits = Limits(step_tokens=rules.step_rule.max_tokens)

    def search(lm: LanguageModel, keys: Keys, prompts: Array, lengths: Array) -> Collected:
        structure, world = begin(lm, prompts, lengths, budget_tokens, cfg=language)
        structure, world = run_compiled(strategy, expand, lm, keys, world, structure, limits=limits)
        rows, teaches = collect_rows(structure, world.tokens, prompts, keys, cfg=cfg)
        return Collected(
            rows=rows,
            teaches=teaches,
            solved=structure.proven.any(-1),
            generated_tokens=structure.budget.generated_tokens,
            expansions=structure.budget.expansions,
        )

    run = search if mesh is None else shard_search(search, mesh)

    def collect(networks: Networks, keys: Keys, prompts: Array, lengths: Array) -> Collected:
        # All of the model is an argument: shards cannot close over what lies on the mesh.
        lm = dataclasses.replace(rules, policy=networks.policy, value_head=networks.value_head)
        return run(lm, keys, prompts, lengths)

    return collect


def init_search_state(
    train: TrainState,
    key: Key[Array, ""],
    collect: Collect,
    batch: tuple[Keys, Array, Array],
    cfg: SearchStepConfig,
    networks: Networks | None = None,
) -> SearchState:
    """The state before the first search.

    Args:
      batch: keys, prompts and lengths, or their shapes.
      networks: that search, where `train.params` is not all of them.
    """
    searching = train.params if networks is None else networks
    shapes = jax.eval_shape(collect, searching, *batch).rows
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
    return SearchState(train=train, replay=make_replay(row, cfg.replay_rows), key=key)


def learn(
    state: SearchState,
    collected: Collected,
    base: Params | None = None,
    *,
    cfg: SearchStepConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> tuple[SearchState, Metrics]:
    """Puts new rows into the buffer and updates the networks on rows drawn from all of it.

    Args:
      base: the policy that adapters change, or that learning stays near: see `token_loss`.
      mesh: the rows of an update are split over its batch axes.
    """
    replay = add_rows(state.replay, collected.rows, collected.teaches)
    key, draw = jax.random.split(state.key)
    loss = loss if base is None else functools.partial(loss, base=base)
    train, steps = state.train, []
    for number in range(cfg.num_updates):
        rows = sample_rows(replay, jax.random.fold_in(draw, number), cfg.batch_rows).rows
        if mesh is not None:
            rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, BATCH_SPEC))
        train, metrics = update_state(train, rows, loss=loss, optimizer=optimizer)
        steps.append(metrics)
    metrics = sum_metrics(steps) | _count(collected)
    return SearchState(train=train, replay=replay, key=key), metrics


def search_and_learn(
    state: SearchState,
    keys: Keys,
    prompts: Int32[Array, "B T"],
    lengths: Int32[Array, "B"],
    base: Params | None = None,
    *,
    collect: Collect,
    cfg: SearchStepConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    lora: LoraConfig | None = None,
    mesh: Mesh | None = None,
) -> tuple[SearchState, Metrics]:
    """One step: `collect`, then `learn`. To be jitted with the state donated."""
    networks = assemble(state.train.params, base, lora)
    collected = collect(networks, keys, prompts, lengths)
    return learn(state, collected, base, cfg=cfg, loss=loss, optimizer=optimizer, mesh=mesh)


def make_search_step(
    collect: Collect,
    *,
    cfg: SearchStepConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    lora: LoraConfig | None = None,
    mesh: Mesh | None = None,
    shardings: PyTree = None,
) -> Callable[..., tuple[SearchState, Metrics]]:
    """`search_and_learn` compiled: (state, keys, prompts, lengths, base) -> (state, metrics).

    Args:
      lora: what is learned are adapters of `base`.
      mesh: see `make_collect` and `learn`. shardings: of the state that goes in and comes out.
    """
    step = functools.partial(
        search_and_learn,
        collect=collect,
        cfg=cfg,
        loss=loss,
        optimizer=optimizer,
        lora=lora,
        mesh=mesh,
    )
    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def _count(collected: Collected) -> Metrics:
    def mean(values: Array) -> MaskedSum:
        return MaskedSum(values.astype(jnp.float32).sum(), jnp.float32(values.shape[0]))

    return {
        "search_solved": mean(collected.solved),
        "search_tokens": mean(collected.generated_tokens),
        "search_expansions": mean(collected.expansions),
        "search_rows": mean(collected.teaches),
    }
