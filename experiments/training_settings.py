"""The settings of a training run: what a config asks of each phase, checked before any starts."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from walks import WalkSettings

from rlm_jax.data.countdown import CountdownMix, check_sizes
from rlm_jax.data.countdown_states import StateMix
from rlm_jax.data.packing import Packed
from rlm_jax.evaluation import build
from rlm_jax.learning.collect import CollectConfig
from rlm_jax.learning.networks import LossConfig, choose_head
from rlm_jax.learning.search_step import SearchStepConfig
from rlm_jax.learning.update import OptimizerConfig
from rlm_jax.models.heads import HeadConfig
from rlm_jax.models.lora import LoraConfig
from rlm_jax.models.state_value import StateValueConfig
from rlm_jax.reasoning.sharding import count_shards
from rlm_jax.tasks.countdown import NUM_GOALS

# Siblings that are compared for each one that a search which widens writes at once.
_MOST_WIDENED = 16
# Behind a move from more numbers stand states that are problems of a test set.
_MOST_SEARCHED = 4
# Chains that ask no network but the policy, and of which every line was written by it.
_WALKING = ("greedy", "greedy_no_repeats")
# The networks are those of `train`.
_NOT_USED = ("model", "dtype", "quantize")


class StateValued(NamedTuple):
    """Settings of the phases in which a state value network learns.

    asked: of the one in which it is asked about `num_asked` goals of each state; None without.
    """

    network: StateValueConfig
    mix: StateMix
    optimizer: OptimizerConfig
    num_asked: int
    asked: OptimizerConfig | None


class Supervised(NamedTuple):
    """Settings of the supervised phase."""

    layout: Packed
    loss: LossConfig
    optimizer: OptimizerConfig


class Walking(NamedTuple):
    """Settings of a phase of corrected walks. plan: how a chain is written, `rows` at a time.

    name: of the phase. The seed of `walks.mix` is its own, for data and batches.
    """

    name: str
    plan: build.Plan
    rows: int
    walks: WalkSettings
    learning: Supervised


class Search(NamedTuple):
    """Settings of the search phase. lora: None where all of the policy is learned."""

    plan: build.Plan
    sizes: tuple[tuple[int, float], ...]
    collect: CollectConfig
    step: SearchStepConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    lora: LoraConfig | None


class Settings(NamedTuple):
    """What a config asks of a run, checked; a phase without steps is None.

    walking: in turn, each on the networks of the one before; none where there are no walks.
    """

    mix: CountdownMix
    head: HeadConfig
    state_value: StateValued | None
    supervised: Supervised | None
    walking: tuple[Walking, ...]
    search: Search | None


def read_settings(config: Mapping[str, Any], tokenizer: str, mesh: Mesh | None) -> Settings:
    """Reads and checks everything a run is asked to do.

    Args:
      tokenizer: the file that the run's tokenizer will be in.

    Raises:
      ValueError: a setting is not accepted, or does not go with another one; names it.
    """
    train = config["train"]
    sizes = [f"{name}_steps" for name in ("log", "checkpoint", "eval")] + ["eval_problems"]
    for name, least in (*((name, 1) for name in sizes), ("num_microbatches", 1), ("keep_best", 0)):
        if train[name] < least:
            raise ValueError(f"train.{name} must be >= {least}, got {train[name]}")
    strategies = ("greedy", train["search"]["strategy"])
    for name in strategies:
        build.plan_strategy(config, name)
    scores = tuple(f"{name}_accuracy" for name in strategies)
    if train["best_metric"] not in scores:
        raise ValueError(f"train.best_metric {train['best_metric']!r}: accepted are {scores}")
    _check_records(train)
    data = {**train["data"], "sizes": _read_sizes("train.data", train["data"])}
    num_shards = data.pop("num_shards")
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"train.data.num_shards must be >= 1, got {num_shards}")
    head = _read_head(train, train["loss"]["value_loss"])
    goal_coef = train["loss"]["goal_coef"]
    if goal_coef and not head.num_goals:
        raise ValueError(f"train.loss.goal_coef={goal_coef}: accepted with value_head 'goals'")
    data |= {"tokenizer": tokenizer, "seed": train["seed"], "num_goals": head.num_goals}
    supervised = None
    if train["num_steps"]:
        supervised = _read_supervised("train", train, head.num_goals, mesh)
    return Settings(
        mix=make_named("train.data", CountdownMix, data),
        head=head,
        state_value=_read_state_value(train, mesh) if train["state_value"]["num_steps"] else None,
        supervised=supervised,
        walking=_read_all_walking(config, data, mesh),
        search=_read_search(config, mesh) if train["search"]["num_steps"] else None,
    )


def list_used(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What the phases use of a config beside `train`, in JSON, by phase and name."""
    # Of walks that begin again, all chains are written alike.
    plans = {"walks": settings.walking[0].plan} if settings.walking else {}
    if settings.search is not None:
        plans["search"] = settings.search.plan
    return {
        f"{phase}.{name}": value
        for phase, plan in plans.items()
        for name, value in {**plan.settings, "bucket_tokens": config["bucket_tokens"]}.items()
        if name not in _NOT_USED
    }


def list_phases(settings: Settings) -> list[str]:
    """The names of a run's phases, in turn."""
    judging = settings.state_value
    phases = {
        "state_value": judging is not None,
        "asked": judging is not None and judging.asked is not None,
        "supervised": settings.supervised is not None,
        **{walking.name: True for walking in settings.walking},
        "search": settings.search is not None,
    }
    return [name for name, is_there in phases.items() if is_there]


def _check_records(train: Mapping[str, Any]) -> None:
    """Raises ValueError where solutions that were found before would not be learned from."""
    paths, share = tuple(train["records"]["paths"]), train["records"]["share"]
    if not 0 <= share <= 1 or bool(share) != bool(paths):
        accepted = "more than 0, at most 1, with" if paths else "0 without"
        raise ValueError(f"train.records.share={share}: accepted is {accepted} train.records.paths")
    if paths and not train["num_steps"]:
        raise ValueError(
            f"train.records.paths={paths}: accepted with train.num_steps above 0, as the "
            "supervised phase alone learns from records"
        )


def _read_state_value(train: Mapping[str, Any], mesh: Mesh | None) -> StateValued:
    where, own = "train.state_value", train["state_value"]
    mix = {**own["data"], "seed": train["seed"]}
    mix["sizes"] = _read_sizes(f"{where}.data", own["data"])
    _check_split(f"{where}.data.num_states", mix["num_states"], mesh)
    num_asked = own["asked"]["num_goals"]
    if not 2 <= num_asked <= NUM_GOALS:
        raise ValueError(f"{where}.asked.num_goals={num_asked}: accepted are 2 to {NUM_GOALS}")
    goals = {"num_goals": NUM_GOALS}
    return StateValued(
        network=make_named(f"{where}.network", StateValueConfig, goals, own["network"]),
        mix=make_named(f"{where}.data", StateMix, mix),
        optimizer=_read_optimizer(where, own),
        num_asked=num_asked,
        asked=_read_optimizer(f"{where}.asked", own["asked"])
        if own["asked"]["num_steps"]
        else None,
    )


def _read_optimizer(where: str, settings: Mapping[str, Any]) -> OptimizerConfig:
    steps = {"num_steps": settings["num_steps"]}
    return make_named(f"{where}.optimizer", OptimizerConfig, steps, settings["optimizer"])


def _read_supervised(
    where: str, train: Mapping[str, Any], num_goals: int, mesh: Mesh | None
) -> Supervised:
    """where: the place of these settings in the config, for messages."""
    layout = make_named(f"{where}.layout", Packed, train["layout"], {"num_goals": num_goals})
    parts = train["num_microbatches"]
    _check_split(f"{where}.layout.num_rows", layout.num_rows, mesh, parts)
    loss = make_named("train.loss", LossConfig, train["loss"])
    if loss.kl_coef:
        raise ValueError("train.loss.kl_coef: accepted in train.search.loss alone")
    return Supervised(layout, loss, _read_optimizer(where, train))


def _read_all_walking(
    config: Mapping[str, Any], data: Mapping[str, Any], mesh: Mesh | None
) -> tuple[Walking, ...]:
    """The phase of walks, and its restarts."""
    train = config["train"]
    num_steps, restarts = train["walks"]["num_steps"], tuple(train["walks"]["restarts"])
    if not num_steps:
        return ()
    if not all(type(steps) is int and steps > 0 for steps in restarts):
        raise ValueError(f"train.walks.restarts={restarts}: accepted are numbers of steps above 0")
    return tuple(
        _read_walking(config, data, number, steps, mesh)
        for number, steps in enumerate((num_steps, *restarts))
    )


def _read_walking(
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    number: int,
    num_steps: int,
    mesh: Mesh | None,
) -> Walking:
    """number: 0, or that of the restart. num_steps: of its own."""
    train = config["train"]
    walks = {**train["walks"], "num_steps": num_steps}
    sampling = {"temperature": walks["temperature"], "method": "sample"}
    strategy = walks["strategy"]
    if strategy not in _WALKING:
        raise ValueError(f"train.walks.strategy={strategy!r}: accepted are {', '.join(_WALKING)}")
    chain = {**config[strategy], "max_depth": walks["max_depth"]}
    chain["sampling"] = {**chain["sampling"], **sampling}
    # Nobody asks what the states of these chains are worth.
    chains = {**config, strategy: chain, "evaluator": "none"}
    one_chain = {"config": chains, "name": strategy}
    plan = make_named("train.walks", build.plan_strategy, one_chain)
    _check_split("train.walks.rows", walks["rows"], mesh)
    changes = {name: walks[name] for name in ("shard_examples", "return_weight", "keep_share")}
    changes["may_err"] = chain["may_err"]
    changes |= {"sizes": _read_sizes("train.walks", walks), "seed": train["seed"] + number}
    mix = make_named("train.walks", CountdownMix, data, changes)
    learning = _read_supervised("train.walks", {**train, **walks}, data["num_goals"], mesh)
    own = {name: walks[name] for name in ("num_chains", "num_shards")}
    own |= {"mix": mix, "max_tokens": learning.layout.max_tokens}
    own_walks = make_named("train.walks", WalkSettings, own)
    name = f"walking_{number}" if number else "walking"
    return Walking(name, plan, walks["rows"], own_walks, learning)


def _read_search(config: Mapping[str, Any], mesh: Mesh | None) -> Search:
    train, search = config["train"], config["train"]["search"]
    plan = build.plan_strategy({**config, "batch_size": 1}, search["strategy"])
    if not config["use_verifier"]:
        raise ValueError(
            "use_verifier=False: accepted is True with train.search.num_steps above 0, as searches "
            "teach what the verifier says"
        )
    sizes = _read_sizes("train.search", search)
    if any(size > _MOST_SEARCHED for size, _ in sizes):
        raise ValueError(
            f"train.search.sizes={sizes}: accepted are 2 to {_MOST_SEARCHED} numbers, as searches "
            "of more pass problems of the test sets"
        )
    make_named("train.search", check_sizes, {"sizes": sizes, "most": _MOST_SEARCHED})
    if search["budget_tokens"] < 1:
        raise ValueError(f"train.search.budget_tokens={search['budget_tokens']}: accepted is >= 1")
    step = make_named("train.search.step", SearchStepConfig, search["step"])
    _check_split("train.search.num_problems", search["num_problems"], mesh)
    _check_split("train.search.step.batch_rows", step.batch_rows, mesh)
    num_children = plan.strategy.num_children
    if plan.settings.get("widen"):
        # A node gets them one after the other, as many as the search thinks worth it.
        num_children *= _MOST_WIDENED
    shape = {"num_children": num_children, "max_depth": plan.language.max_depth}
    loss = make_named("train.search.loss", LossConfig, train["loss"], search["loss"])
    _read_head(train, loss.value_loss)
    updates = {"num_steps": search["num_steps"] * step.num_updates}
    optimizer = make_named("train.search.optimizer", OptimizerConfig, updates, search["optimizer"])
    collect = make_named("train.search.collect", CollectConfig, shape, search["collect"])
    if collect.row_tokens < config["bucket_tokens"]:
        raise ValueError(
            f"train.search.collect.row_tokens={collect.row_tokens}: accepted is >= "
            f"{config['bucket_tokens']}, the bucket_tokens of a prompt"
        )
    lora = None
    if search["lora_rank"]:
        fields = {"rank": search["lora_rank"], "alpha": search["lora_alpha"]}
        lora = make_named("train.search.lora_rank, lora_alpha", LoraConfig, fields)
    return Search(
        plan=plan,
        sizes=sizes,
        collect=collect,
        step=step,
        loss=loss,
        optimizer=optimizer,
        lora=lora,
    )


def _read_head(train: Mapping[str, Any], value_loss: str) -> HeadConfig:
    """The value head, which a phase trains by `value_loss`."""
    return choose_head(train["value_head"], value_loss, NUM_GOALS)


def make_named(where: str, make: Callable[..., Any], *fields: Mapping[str, Any]) -> Any:
    """`make` of all fields, later ones first; a wrong one is named with its place in the config."""
    try:
        return make(**{name: value for part in fields for name, value in part.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_split(name: str, size: int, mesh: Mesh | None, num_parts: int = 1) -> None:
    ways = num_parts * (1 if mesh is None else count_shards(mesh))
    if size < 1 or size % ways:
        raise ValueError(
            f"{name}={size}: accepted are multiples of {ways}, the batch's parts "
            f"({num_parts} microbatches on {ways // num_parts} shards)"
        )


def _read_sizes(where: str, part: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """Numbers of a problem and their shares, as a config holds them, in tuples."""
    try:
        return tuple((operator.index(size), float(share)) for size, share in part["sizes"])
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}.sizes={part['sizes']}: accepted are pairs of a whole number and its share"
        ) from None
