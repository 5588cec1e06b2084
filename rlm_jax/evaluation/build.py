"""From a config to a solver: the model, its tokenizer, a strategy and what they are run with.

A config is any nested mapping with the fields of `configs/smollm2.py`, which lists every option of
every strategy. Everything is checked before the model is loaded, so that a wrong setting costs no
time. Several evaluators are mixed by "p_yes=0.5,rollout=0.5", or by a mapping of their weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax

from rlm_jax.evaluation.chains import CHAINS
from rlm_jax.evaluation.prompts import make_judge
from rlm_jax.evaluation.solver import SIZES, Solver, check_sizes
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.checkpoint import float_dtype
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import apply_value_head
from rlm_jax.models.load import load_model
from rlm_jax.models.params import Params, init_params
from rlm_jax.models.presets import preset
from rlm_jax.models.quantize import check_quantization, quantize_params
from rlm_jax.models.state_value import STATE_VALUE, StateValue
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel
from rlm_jax.reasoning.language_values import needs_state_value, parse_evaluator, write_evaluator
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.strategies import (
    beam,
    best_first,
    best_of_n,
    greedy,
    gumbel,
    puct,
    td_mcts,
    uct,
)
from rlm_jax.tasks import (
    arithmetic,
    countdown,
    free,
    game24,
    gsm8k,
    knapsack,
    prontoqa,
    reasoning_gym,
    riddles,
    sat,
    sorting,
)
from rlm_jax.tasks.base import Task
from rlm_jax.tasks.device import DeviceTask
from rlm_jax.text.answers import make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule
from rlm_jax.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TREE_SEARCHES: dict[str, Callable[..., Strategy]] = {
    "gumbel": gumbel.make_gumbel,
    "puct": puct.make_puct,
    "uct": uct.make_uct,
    "td_mcts": td_mcts.make_td_mcts,
    "beam": beam.make_beam,
    "best_first": best_first.make_best_first,
    "best_first_widening": best_first.make_best_first,
    "best_first_controlled": best_first.make_best_first,
    "best_first_widening_controlled": best_first.make_best_first,
}
STRATEGIES = (*CHAINS, *TREE_SEARCHES)
_TASK_MODULES = (
    free, gsm8k, arithmetic, countdown, game24, knapsack, prontoqa, reasoning_gym, riddles, sat,
    sorting,
)  # fmt: skip
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _TASK_MODULES}
_RANDOM = "random:"
_NOT_SETTINGS = ("sampling", "evaluator")
_NOT_AHEAD = "does not list the states one step on"
_NO_STATES, _STATES = "does not say what its states are", "what the states are"
_VALUES = (
    "evaluator", "aggregate", "mixture", "num_rollouts", "rollout_tokens", "rollout_discount",
    "dead_value", "drop_illegal",
)  # fmt: skip
_FIELDS = (
    *SIZES, *_VALUES, "model", "dtype", "quantize", "task", "use_verifier", "step", "max_depth",
)  # fmt: skip


class Policy(NamedTuple):
    """A loaded language model with its tokenizer; version names its weights in records."""

    params: Params
    cfg: ModelConfig
    tokenizer: Tokenizer
    value_head: Any
    version: str
    state_value: StateValue | None = None


class Plan(NamedTuple):
    """A checked strategy setting: what `build_solver` needs beside the model.

    language: of a stand-in for the model, which is not loaded yet.
    """

    strategy: Strategy
    language: LanguageConfig
    settings: dict[str, Any]


def load_policy(spec: str, dtype: str = "float32", quantize: str | None = None) -> Policy:
    """Loads a model and its tokenizer; "random:PRESET" is a byte-level model without training.

    Args:
      quantize: "int8" rounds the weights once they are loaded (`rlm_jax.models.quantize`); `dtype`
        is then the type of everything else.

    Raises:
      FileNotFoundError, ValueError: as `rlm_jax.models.load.load_model`; an unknown `quantize`.
    """
    check_quantization(quantize)
    policy = _load_floats(spec, float_dtype(dtype))
    if quantize is None:
        return policy
    params = quantize_params(policy.params, policy.cfg)
    return policy._replace(params=params, version=f"{policy.version} ({quantize})")


def _load_floats(spec: str, weights: Any) -> Policy:
    if spec.startswith(_RANDOM):
        tokenizer = cast(Tokenizer, ByteTokenizer())
        cfg = dataclasses.replace(
            preset(spec.removeprefix(_RANDOM)),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_ids=tokenizer.eos_ids,
            context_length=2048,
        )
        params = init_params(jax.random.key(0), cfg, weights)
        return Policy(params, cfg, tokenizer, None, spec)
    model = load_model(spec, weights)
    tokenizer = load_tokenizer(model.tokenizer_source)
    return Policy(model.params, model.cfg, tokenizer, model.value_head, spec, model.state_value)


def plan_strategy(config: Mapping[str, Any], name: str) -> Plan:
    """Checks the settings of one strategy of a config.

    Raises:
      ValueError: a missing field, an unknown strategy, task or evaluator, or a value out of
        range, by its name.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r}: accepted are {', '.join(STRATEGIES)}")
    missing = [field for field in (*_FIELDS, name) if field not in config]
    if name in config:
        own_fields = ("sampling", "num_nodes") if name in TREE_SEARCHES else ("sampling",)
        missing += [f"{name}.{field}" for field in own_fields if field not in config[name]]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    # A strategy may be better off with another evaluator than the others.
    config = {**config, "evaluator": config[name].get("evaluator", config["evaluator"])}
    float_dtype(config["dtype"])
    check_quantization(config["quantize"])
    check_sizes({size: config[size] for size in SIZES})
    if config["task"] not in TASKS:
        raise ValueError(f"task {config['task']!r}: accepted are {', '.join(TASKS)}")
    for flag in ("use_verifier", "drop_illegal"):
        if not isinstance(config[flag], bool):
            raise ValueError(f"{flag} {config[flag]!r}: accepted are true, false")
    _make("step", StepSpec, config["step"])
    own = {key: value for key, value in config[name].items() if key not in _NOT_SETTINGS}
    max_depth = own.pop("max_depth", config["max_depth"])
    may_err = own.pop("may_err", False)
    _check_may_err(config, name, may_err)
    sampling = _make(f"{name}.sampling", SamplingConfig, config[name]["sampling"])
    if sampling.repeats:
        own = _write_once(name, own, sampling.method)
    strategy, num_nodes = _make_strategy(name, own, max_depth)
    _check_going_back(config, name, sampling)
    _check_legal_only(config, name, sampling)
    _check_states(config)
    if sampling.method == "greedy" and own.get("num_children", 1) > 1:
        raise ValueError(
            f"{name}.num_children={own['num_children']}: accepted is 1 with sampling.method="
            "'greedy', or a node's children are the same step"
        )
    if own.get("widen") and not sampling.no_repeats:
        raise ValueError(
            f"{name}.widen=True: accepted is sampling.no_repeats=True with it, or a node writes "
            "the same steps again"
        )
    if own.get("widen") and own.get("num_children") != 1 and sampling.method == "sample":
        raise ValueError(
            f"{name}.num_children={own.get('num_children')}: accepted is 1 with widen=True and "
            "sampling.method='sample', or a node's children may be the same step"
        )
    if own.get("merge_states") and (reason := _find_lack(config, "key", _NO_STATES, _STATES)):
        raise ValueError(f"{name}.merge_states=True: accepted is False, as {reason}")
    if own.get("max_refused") and not (config["use_verifier"] and config["drop_illegal"]):
        raise ValueError(
            f"{name}.max_refused={own['max_refused']}: accepted is 0 without use_verifier and "
            "drop_illegal, as nothing refuses steps then"
        )
    judge = own.get("judge", "expansion")
    language = dataclasses.replace(
        _make_language(config, sampling, num_nodes, judge),
        max_depth=max_depth,
        may_return=name not in TREE_SEARCHES,
        may_err=may_err,
    )
    shared = (
        "model",
        "dtype",
        "quantize",
        "task",
        "use_verifier",
        *_VALUES,
        "budget_tokens",
        "max_depth",
        "page_tokens",
    )
    settings = {key: config[key] for key in shared} | {"evaluator": language.evaluator}
    settings |= {f"step.{key}": value for key, value in config["step"].items()}
    settings |= {f"sampling.{key}": v for key, v in config[name]["sampling"].items()}
    settings |= own | {"max_depth": max_depth}
    settings |= {"may_err": True} if may_err else {}
    return Plan(strategy, language, settings)


def build_solver(
    config: Mapping[str, Any],
    plan: Plan,
    policy: Policy,
    *,
    seed: int,
    batch_size: int,
    driver: str = "compiled",
    chunk_rounds: int = 16,
) -> Solver:
    """A solver for one strategy over a loaded model.

    Raises:
      ValueError: settings that do not fit the model (an evaluator it has no head for, a vocabulary
        that does not spell what steps are to be held to).
    """
    language = plan.language
    value_head = None
    if language.value_fn is not None:
        if policy.value_head is None:
            raise ValueError(
                f"evaluator 'value_head': {policy.version} comes without a value head; accepted is "
                "what needs none, such as confidence"
            )
        value_head = policy.value_head
    state_value = None
    if needs_state_value(language.evaluator) or language.sampling.outcome_weight:
        if policy.state_value is None:
            setting = f"evaluator {language.evaluator!r}"
            if not needs_state_value(language.evaluator):
                setting = f"sampling.outcome_weight={language.sampling.outcome_weight}"
            raise ValueError(
                f"{setting}: {policy.version} comes without a network for states "
                f"({STATE_VALUE}); accepted is what needs none, such as value_head"
            )
        state_value = policy.state_value
    task = TASKS[config["task"]]
    checker = task.device if config["use_verifier"] and task.self_verifying else None
    language = dataclasses.replace(language, model=policy.cfg, task=checker)
    asks = "p_yes" in parse_evaluator(language.evaluator)
    tables = None
    if checker is not None:
        tables = _make_task_tables(checker, policy, language.sampling.legal_only)
    lm = LanguageModel(
        policy=policy.params,
        step_rule=make_step_rule(StepSpec(**config["step"]), policy.tokenizer),
        answer_rule=make_answer_rule(policy.tokenizer),
        value_head=value_head,
        judge=make_judge(policy.tokenizer) if asks else None,
        task_tables=tables,
        state_value=state_value,
    )
    return Solver(
        task=task,
        tokenizer=policy.tokenizer,
        lm=jax.device_put(lm),
        language=language,
        strategy=plan.strategy,
        budget_tokens=config["budget_tokens"],
        batch_size=batch_size,
        bucket_tokens=config["bucket_tokens"],
        seed=seed,
        settings=plan.settings,
        policy_version=policy.version,
        driver=driver,
        chunk_rounds=chunk_rounds,
    )


def _write_once(name: str, own: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A strategy's settings where the same steps come back whenever they are asked for.

    Raises:
      ValueError: a setting asks for them again.
    """
    once: dict[str, Any] = {"num_chains": 1, "root_lanes": 1, "resample": False}
    for key, accepted in once.items():
        if own.get(key, accepted) not in (accepted, None):
            raise ValueError(
                f"{name}.{key}={own[key]}: accepted is {accepted} with sampling.method={method!r}, "
                "which writes the same steps again"
            )
    # Where nothing is said, beams sample the root side by side, other trees an exhausted one anew.
    if name == "beam":
        return {**own, "root_lanes": 1}
    return {**own, "resample": False} if name in TREE_SEARCHES else dict(own)


def _check_going_back(config: Mapping[str, Any], name: str, sampling: SamplingConfig) -> None:
    """Raises ValueError where a setting for steps that go back would do nothing."""
    names = ("return_bias", "doubt_weight", "copy_returns")
    settings = [key for key in names if getattr(sampling, key)]
    if not settings:
        return
    reason = _find_lack(config, "returns", "has no steps that go back", "which steps go back")
    if name in TREE_SEARCHES:
        reason = "a tree goes back by itself"
    if reason is None:
        device = TASKS[config["task"]].device
        assert device is not None
        if sampling.doubt_weight and "none" in parse_evaluator(config["evaluator"]):
            settings, reason = ["doubt_weight"], "evaluator 'none' doubts nothing"
        elif sampling.copy_returns and None in (device.marks, device.left):
            settings, reason = ["copy_returns"], "the task does not say what its steps leave"
    if reason is not None:
        value = getattr(sampling, settings[0])
        accepted = False if value is True else 0
        where = f"{name}.sampling.{settings[0]}"
        raise ValueError(f"{where}={value}: accepted is {accepted}, as {reason}")


def _check_may_err(config: Mapping[str, Any], name: str, may_err: bool) -> None:
    """Raises ValueError where wrong steps cannot be gone on from."""
    if may_err is False:
        return
    accepted, reason = "False", None
    if may_err is not True:
        accepted, reason = "true, false", "it is a flag"
    elif name in TREE_SEARCHES:
        reason = "a tree goes on from steps that follow alone"
    elif TASKS[config["task"]].drop_errors is None:
        reason = f"task {config['task']!r} does not say what a wrong step leaves"
    elif not config["use_verifier"]:
        reason = "without use_verifier nothing says what steps leave"
    if reason is not None:
        raise ValueError(f"{name}.may_err={may_err!r}: accepted is {accepted}, as {reason}")


def _check_legal_only(config: Mapping[str, Any], name: str, sampling: SamplingConfig) -> None:
    """Raises ValueError where `legal_only` would do nothing."""
    if not sampling.legal_only:
        return
    reason = _find_lack(config, "moves", "does not list its legal steps", "which steps are legal")
    if reason is not None:
        raise ValueError(f"{name}.sampling.legal_only=True: accepted is False, as {reason}")
    if sampling.outcome_weight:
        reason = _find_lack(config, "outcomes", _NOT_AHEAD, "what they are")
    if reason is not None:
        where = f"{name}.sampling.outcome_weight={sampling.outcome_weight}"
        raise ValueError(f"{where}: accepted is 0, as {reason}")


def _check_states(config: Mapping[str, Any]) -> None:
    """Raises ValueError where the network for states would be shown nothing."""
    if not needs_state_value(config["evaluator"]):
        return
    reason = _find_lack(config, "observe", _NO_STATES, _STATES)
    if reason is None and "state_lookahead" in parse_evaluator(config["evaluator"]):
        reason = _find_lack(config, "outcomes", _NOT_AHEAD, "what they are")
    if reason is not None:
        raise ValueError(f"evaluator {config['evaluator']!r}: {reason}")


def _find_lack(config: Mapping[str, Any], offer: str, lack: str, what: str) -> str | None:
    """Why a setting that needs `DeviceTask`'s field `offer` does nothing; None where it may."""
    device = TASKS[config["task"]].device
    if device is None or getattr(device, offer) is None:
        return f"task {config['task']!r} {lack}"
    if not config["use_verifier"]:
        return f"without use_verifier nothing says {what}"
    return None


def _make_language(
    config: Mapping[str, Any], sampling: SamplingConfig, num_nodes: int, judge: str
) -> LanguageConfig:
    """What the expander is run with, checked before there is a model to run it with."""
    weights = parse_evaluator(config["evaluator"])
    values: dict[str, Any] = {key: config[key] for key in _VALUES}
    values["evaluator"] = write_evaluator(weights)
    return LanguageConfig(
        model=preset("tiny-llama"),
        sampling=sampling,
        num_nodes=num_nodes,
        judge=judge,
        max_new_tokens=config["budget_tokens"],
        page_tokens=config["page_tokens"],
        value_fn=apply_value_head if "value_head" in weights else None,
        **values,
    )


def _make_task_tables(checker: DeviceTask, policy: Policy, legal_only: bool) -> Any:
    """What the model's tokens say to a task; ids that the tokenizer does not know say nothing."""
    known = range(policy.tokenizer.vocab_size)
    spare = policy.cfg.vocab_size - len(known)
    tables = checker.make_tables([*map(policy.tokenizer.token_bytes, known), *[b""] * spare])
    if legal_only and checker.moves is not None and not checker.moves.fits(tables):
        raise ValueError(
            f"sampling.legal_only=True: accepted is False with {policy.version}, whose tokens are "
            "not those that the task spells its steps with"
        )
    return tables


def _make_strategy(name: str, settings: Mapping[str, Any], max_depth: int) -> tuple[Strategy, int]:
    """The strategy, and the nodes its structures need."""
    own = {"max_depth": max_depth, **settings}
    max_refused = settings.get("max_refused", 0)
    if name == "best_of_n":
        strategy = _make(name, best_of_n.make_best_of_n, own)
        return strategy, 1 + settings["num_chains"] * (max_depth + max_refused)
    if name in CHAINS:
        # One chain; they differ in how it is decoded, which is the config's.
        strategy = _make(name, greedy.make_greedy, own)._replace(name=name)
        return strategy, 1 + max_depth + max_refused
    num_nodes = own.pop("num_nodes")
    strategy = _make(name, TREE_SEARCHES[name], own)._replace(name=name)
    least = 1 + strategy.num_lanes * strategy.num_children
    if num_nodes < least:
        raise ValueError(f"{name}: num_nodes={num_nodes}: accepted is >= {least}, one round")
    return strategy, num_nodes


def _make(name: str, make: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """`make(**settings)`, where a wrong, unknown or missing setting is the user's mistake."""
    try:
        return make(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
