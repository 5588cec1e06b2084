"""The phases of a training run, and their updates; `training_settings.py` reads what they are.

A phase is a state, a generator of updates over it, and where its data stands, in JSON: so one loop,
that of train.py, logs, evaluates, saves and resumes all of them.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from training_settings import Search, Settings, StateValued, Supervised, Walking, make_named
from walks import open_walks, sample_chains

from rlm_jax.core.sharding import TENSOR_PARALLEL, Rules
from rlm_jax.data.countdown import draw_problems, is_held_out_question, make_shards, passes_held_out
from rlm_jax.data.countdown_states import make_asked, make_states
from rlm_jax.data.examples import TokenExample, TokenTable
from rlm_jax.data.generated import NUM_SHARDS, GeneratedSource, make_ahead, mix_shards
from rlm_jax.data.iterators import make_batches
from rlm_jax.evaluation import build, solver
from rlm_jax.evaluation.prompts import encode_problem, pad_prompts
from rlm_jax.learning.expert_iteration import read_examples
from rlm_jax.learning.networks import Adapted, Networks, assemble, init_adapted, token_loss
from rlm_jax.learning.search_step import init_search_state, make_collect, make_search_step
from rlm_jax.learning.state_values import (
    asked_value_loss,
    count_asked,
    count_goals,
    state_value_loss,
)
from rlm_jax.learning.update import (
    OptimizerConfig,
    TrainState,
    init_state,
    make_optimizer,
    spread_state,
    update_state,
)
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import init_value_head
from rlm_jax.models.lora import LoraConfig, lora_axes
from rlm_jax.models.params import Params, param_axes
from rlm_jax.models.state_value import (
    StateValue,
    begin_asking,
    init_state_value,
    widen_numbers,
)
from rlm_jax.reasoning.sharding import count_shards, place_batch, place_params
from rlm_jax.tasks.base import Problem
from rlm_jax.tasks.countdown import MAX_NUMBER, TARGETS, make_problem
from rlm_jax.text.tokenizer import Tokenizer


class Run(NamedTuple):
    """What all phases need. config: the whole file; train: its part for training.

    solvers: of the evaluations, compiled once. mesh: what it runs on, None for one device. rules:
    how parameters are split over it. state_value: the network of its own that judges states, once
    there is one; no other phase changes it. solutions: of searches made before, to learn from.
    """

    config: dict[str, Any]
    train: dict[str, Any]
    settings: Settings
    workdir: pathlib.Path
    tokenizer: Tokenizer
    model: ModelConfig
    solvers: dict[str, solver.Solver]
    mesh: Mesh | None
    rules: Rules
    state_value: StateValue | None = None
    solutions: Sequence[TokenExample] = ()


# Yields (state, metrics, tokens, position_fn) of one update after another.
Steps = Generator[tuple[Any, Any, int, Callable[[], Any]]]


class Phase(NamedTuple):
    """A loop of updates: `steps(state, position)` yields (state, metrics, tokens, position_fn).

    name: of its checkpoints' folder and its metrics. position: where its data stands, in JSON; None
    at the beginning, and told by `position_fn()` until the next update.
    networks: those that the state has learned. evaluates: they can be searched with.
    """

    name: str
    num_steps: int
    state: Any
    steps: Callable[[Any, Any], Steps]
    networks: Callable[[Any], Any]
    evaluates: bool = True


def make_model(network: Mapping[str, int], tokenizer: Tokenizer) -> ModelConfig:
    """The policy's shape, from `train.network` and what the tokenizer knows."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=network["num_layers"],
        model_dim=network["model_dim"],
        num_heads=network["num_heads"],
        num_kv_heads=network["num_heads"],
        head_dim=network["model_dim"] // network["num_heads"],
        ffn_dim=network["ffn_dim"],
        qk_norm=True,
        tie_embeddings=True,
        context_length=network["context_length"],
        eos_ids=tuple(tokenizer.eos_ids),
        bos_id=tokenizer.bos_id,
    )


def take_networks(run: Run, start: build.Policy) -> Networks:
    """Networks that were trained before; a value head is drawn where they came without one, and one
    that judges a single goal is given others to learn beside it.

    Raises:
      ValueError: their value head is not the one that `train.value_head` asks for.
    """
    key = jax.random.key(run.train["seed"])
    new = init_value_head(key, run.model.model_dim, run.settings.head)
    if start.value_head is None:
        return Networks(start.params, new)
    head = start.value_head
    if head.goals is None and new.goals is not None:
        head = dataclasses.replace(head, goals=new.goals)
    shapes = [jax.tree.map(jnp.shape, one) for one in (head, new)]
    if jax.tree.flatten(shapes[0]) != jax.tree.flatten(shapes[1]):
        raise ValueError(
            f"{start.version}: its value head is none of "
            f"train.value_head={run.train['value_head']!r}"
        )
    return Networks(start.params, head)


def as_policy(run: Run, networks: Networks) -> build.Policy:
    """The networks as solvers take them."""
    return build.Policy(
        networks.policy,
        run.model,
        run.tokenizer,
        networks.value_head,
        str(run.workdir),
        run.state_value,
    )


def make_solver(run: Run, plan: build.Plan, networks: Networks, num_rows: int) -> solver.Solver:
    """A solver by these networks, over the run's mesh if it has one; rows to fill its shards."""
    shards = 1 if run.mesh is None else count_shards(run.mesh)
    rows = -(-num_rows // shards) * shards
    policy = as_policy(run, networks)
    one = build.build_solver(run.config, plan, policy, seed=0, batch_size=rows)
    return one if run.mesh is None else solver.spread_solver(one, run.mesh)


def with_networks(run: Run, one: solver.Solver, networks: Networks) -> solver.Solver:
    """The same solver by other networks, without compiling anew."""
    networks = place_networks(run, networks, TENSOR_PARALLEL)
    lm = dataclasses.replace(one.lm, policy=networks.policy, value_head=networks.value_head)
    return dataclasses.replace(one, lm=lm)


def place_networks(run: Run, networks: Networks, rules: Rules) -> Networks:
    """The networks on the run's mesh, if it has one."""
    if run.mesh is None:
        return networks
    axes = param_axes(run.model, run.mesh.shape["model"])
    return place_params(run.mesh, networks, rules, policy=axes)


def list_judging(settings: Settings) -> list[Callable[[Run], Phase]]:
    """The phases in which a value network of its own learns, each from where the last one ended."""
    judging = settings.state_value
    if judging is None:
        return []
    first = functools.partial(_make_state_value, judging)
    if judging.asked is None:
        return [first]
    return [first, functools.partial(_make_asked_value, judging, judging.asked)]


def _make_state_value(settings: StateValued, run: Run) -> Phase:
    """On states whose every goal the exact solver has looked at.

    A network that a run begins with goes on learning by the readout that it has.
    """
    if run.state_value is None:
        network = init_state_value(jax.random.key(run.train["seed"]), settings.network)
    else:
        network = run.state_value
    return _learn_states(run, "state_value", network, settings, settings.optimizer, first=0)


def _make_asked_value(settings: StateValued, asked: OptimizerConfig, run: Run) -> Phase:
    """The network of the phase above, as one that is asked about some goals of each state."""
    assert run.state_value is not None
    network = begin_asking(run.state_value)
    # Other states than those of the phase above.
    first = settings.optimizer.num_steps
    return _learn_states(run, "asked", network, settings, asked, first)


def _learn_states(
    run: Run,
    name: str,
    network: StateValue,
    settings: StateValued,
    learning: OptimizerConfig,
    first: int,
) -> Phase:
    """A phase of updates by batches of states, those of the numbers from `first` on."""
    # A copy: what is learned is donated to the first update.
    network = jax.tree.map(jnp.copy, widen_numbers(network, settings.network.num_numbers))
    optimizer = make_optimizer(learning, network)
    state = _spread(run, init_state(network, optimizer))
    if network.cfg.readout == "factors":
        make_batch = functools.partial(make_states, settings.mix)
        losses: dict[str, Any] = {"loss": state_value_loss, "totals_fn": count_goals}
    else:
        make_batch = functools.partial(make_asked, settings.mix, settings.num_asked)
        losses = {"loss": asked_value_loss, "totals_fn": count_asked}
    update = _compile_update(run, state, optimizer=optimizer, **losses)

    def steps(state: Any, position: Any) -> Steps:
        number = first if position is None else position
        with make_ahead(make_batch, number) as batches:
            for batch in batches:
                state, metrics = update(state, _split(run, batch))
                number += 1
                yield state, metrics, int((batch.items >= 0).sum()), functools.partial(int, number)

    return Phase(
        name, learning.num_steps, state, steps, lambda state: state.params, evaluates=False
    )


def read_solutions(config: dict[str, Any], tokenizer: Tokenizer) -> Sequence[TokenExample]:
    """The solutions in `train.records`, for the supervised phase; read before any phase begins.

    Raises:
      FileNotFoundError, ValueError: as `read_examples`.
    """
    records = config["train"]["records"]
    if not records["paths"]:
        return ()
    return read_examples(
        records["paths"],
        task=build.TASKS[config["task"]],
        tokenizer=tokenizer,
        held_out_fn=is_held_out_question,
        passes_fn=passes_held_out,
        max_per_problem=records["max_per_problem"],
    )


def make_supervised(run: Run, networks: Networks) -> Phase:
    """Cross-entropy and values on demonstrations, made while the training goes on."""
    settings, mix = run.settings.supervised, run.settings.mix
    assert settings is not None
    make_shard = _mix_in_records(run)
    num_shards = run.train["data"]["num_shards"] or NUM_SHARDS

    def open_source(_: Callable[[], Networks]) -> contextlib.closing[GeneratedSource]:
        return contextlib.closing(
            GeneratedSource(make_shard, num_shards=num_shards, shard_examples=mix.shard_examples)
        )

    return _learn_tokens(run, networks, "supervised", settings, open_source, seed=mix.seed)


def make_walking(run: Run, settings: Walking, networks: Networks) -> Phase:
    """The same on chains of the networks' own, corrected by the solver (`walks.py`)."""
    one = make_solver(run, settings.plan, networks, settings.rows)

    def open_source(networks_fn: Callable[[], Networks]) -> Any:
        def sample(problems: Sequence[Problem]) -> list[str]:
            return sample_chains(with_networks(run, one, networks_fn()), problems)

        return open_walks(settings.walks, run.workdir / settings.name / "chains", sample)

    seed = settings.walks.mix.seed
    return _learn_tokens(run, networks, settings.name, settings.learning, open_source, seed=seed)


def _learn_tokens(
    run: Run,
    networks: Networks,
    name: str,
    settings: Supervised,
    open_source: Callable[[Callable[[], Networks]], contextlib.AbstractContextManager[Any]],
    *,
    seed: int,
) -> Phase:
    """Updates on token examples. open_source: gets what tells the networks of the moment."""
    networks = place_networks(run, networks, run.rules)
    optimizer = make_optimizer(settings.optimizer, networks)
    state = _spread(run, init_state(networks, optimizer))
    update = _compile_update(
        run,
        state,
        loss=functools.partial(token_loss, model=run.model, cfg=settings.loss),
        optimizer=optimizer,
        num_microbatches=run.train["num_microbatches"],
    )

    def steps(state: Any, position: Any) -> Steps:
        with open_source(lambda: state.params) as source:
            batches = make_batches(
                source, settings.layout, seed=seed, shuffle=False, too_long="drop"
            )
            if position is not None:
                batches.set_state(position)
            while True:
                before = batches.counts.tokens
                batch = next(batches)
                state, metrics = update(state, _split(run, batch))
                yield state, metrics, batches.counts.tokens - before, batches.get_state

    return Phase(name, settings.optimizer.num_steps, state, steps, lambda state: state.params)


def _compile_update(run: Run, state: TrainState, **options: Any) -> Callable[..., Any]:
    """`update_state` with these options; its state is donated, and stays where it lies."""
    return jax.jit(
        functools.partial(update_state, **options),
        donate_argnums=0,
        out_shardings=None if run.mesh is None else (_shardings(state), None),
    )


def _mix_in_records(run: Run) -> Callable[[int], list[TokenExample]]:
    """Shards of demonstrations, and of solutions that searches found before (expert iteration)."""
    mix = run.settings.mix
    if not run.solutions:
        return make_shards(mix)
    mixed = functools.partial(mix_shards, make_shards(mix), TokenTable(run.solutions))
    share = run.train["records"]["share"]
    return make_named("train.records", mixed, {"share": share, "seed": mix.seed})


def require_room(config: Mapping[str, Any], search: Search, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the longest problem to search has no room in `bucket_tokens`."""
    most = max(size for size, _ in search.sizes)
    longest = make_problem((MAX_NUMBER,) * most, max(TARGETS))
    needed = len(encode_problem(tokenizer, build.TASKS[config["task"]], longest))
    if needed > config["bucket_tokens"]:
        raise ValueError(
            f"bucket_tokens={config['bucket_tokens']}: accepted is >= {needed}, the tokens of a "
            f"prompt of {most} numbers, which train.search.sizes asks for"
        )


class SearchProgram(NamedTuple):
    """Search and learning as one compiled step: step_fn(state, *draw(number), base).

    state: before the first. draw: keys, prompts and lengths of a step's problems. base: the policy
    that does not learn, where one is needed. lora: None where all of the policy is learned.
    """

    step_fn: Callable[..., Any]
    state: Any
    draw: Callable[[int], tuple[Any, Any, Any]]
    base: Params | None
    lora: LoraConfig | None


def make_search(run: Run, networks: Networks) -> Phase:
    """Search and learning in one compiled step, on problems without solutions."""
    program = make_search_program(run, networks)

    def steps(state: Any, position: Any) -> Steps:
        number = 0 if position is None else position
        while True:
            state, metrics = program.step_fn(state, *program.draw(number), program.base)
            number += 1
            yield state, metrics, 0, functools.partial(int, number)

    def of_state(state: Any) -> Networks:
        return assemble(state.train.params, program.base, program.lora)

    return Phase("search", run.train["search"]["num_steps"], program.state, steps, of_state)


def make_search_program(run: Run, networks: Networks) -> SearchProgram:
    """What the search phase runs, on the networks that it begins with."""
    settings, search = run.settings.search, run.train["search"]
    assert settings is not None
    networks = place_networks(run, networks, run.rules)
    policy = as_policy(run, networks)
    one = build.build_solver(
        run.config, settings.plan, policy, seed=run.train["seed"], batch_size=1
    )
    learned, base = _choose_learned(run, settings, networks)
    optimizer = make_optimizer(settings.optimizer, learned)
    collect = make_collect(
        one.lm,
        language=one.language,
        strategy=one.strategy,
        cfg=settings.collect,
        budget_tokens=search["budget_tokens"],
        mesh=run.mesh,
    )

    def draw(number: int) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng([run.train["seed"], 1, number])
        problems = draw_problems(rng, search["num_problems"], settings.sizes)
        prompts = [encode_problem(run.tokenizer, one.task, problem) for problem in problems]
        tokens, lengths = pad_prompts(prompts, run.config["bucket_tokens"])
        keys = jax.random.split(jax.random.key(number), len(problems))
        return _split(run, (keys, jnp.asarray(tokens), jnp.asarray(lengths)))

    train = init_state(learned, optimizer)
    key = jax.random.key(run.train["seed"])
    state = init_search_state(train, key, collect, draw(0), settings.step, networks)
    state = _spread(run, state)
    step_fn = make_search_step(
        collect,
        cfg=settings.step,
        loss=functools.partial(token_loss, model=run.model, cfg=settings.loss, lora=settings.lora),
        optimizer=optimizer,
        lora=settings.lora,
        mesh=run.mesh,
        shardings=None if run.mesh is None else _shardings(state),
    )
    return SearchProgram(step_fn, state, draw, base, settings.lora)


def _choose_learned(
    run: Run, settings: Search, networks: Networks
) -> tuple[Networks | Adapted, Params | None]:
    """What the search phase learns, and the policy that stays as it is, where one is needed."""
    if settings.lora is None:
        # A copy: what is learned is donated to the first update.
        base = jax.tree.map(jnp.copy, networks.policy) if settings.loss.kl_coef else None
        return networks, base
    key = jax.random.fold_in(jax.random.key(run.train["seed"]), 1)
    learned = init_adapted(key, networks, run.model, settings.lora)
    if run.mesh is not None:
        axes = lora_axes(run.model, settings.lora, run.mesh.shape["model"])
        learned = place_params(run.mesh, learned, run.rules, lora=axes)
    return learned, networks.policy


def _split(run: Run, batch: Any) -> Any:
    return batch if run.mesh is None else place_batch(run.mesh, batch)


def _spread(run: Run, state: Any) -> Any:
    return state if run.mesh is None else spread_state(run.mesh, state)


def _shardings(state: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, state)
