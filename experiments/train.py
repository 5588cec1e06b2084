"""Trains a policy and a value network from scratch on a puzzle, then by their own search.

    python experiments/train.py --config=configs/countdown.py --workdir=DIR

First supervised, on demonstrations by an exact solver; then, for `train.search.num_steps` steps,
search -> train -> search inside one compiled step. DIR holds everything: the tokenizer,
checkpoints, metrics.jsonl, TensorBoard's files and, at the end, the networks in DIR/policy, which
solve.py and evaluate.py load. The same command started again, after Ctrl-C, SIGTERM, kill -9 or a
power cut, goes on where it stopped and ends on the same parameters, bit for bit. An update that is
no number ends a run with status 3, the networks before it saved. --mesh=data=8 splits batches over
devices; a run may go on on another mesh.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import launching
import phases
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from phases import Phase, Run
from training_settings import Settings, list_phases, list_used, read_settings

from rlm_jax.core.files import write_whole
from rlm_jax.core.sharding import FSDP, TENSOR_PARALLEL
from rlm_jax.core.stopping import catch_stop
from rlm_jax.data.countdown import make_shard, problem_key
from rlm_jax.data.countdown_states import list_problems, make_states
from rlm_jax.data.examples import TokenExample
from rlm_jax.data.overlap import require_disjoint
from rlm_jax.data.records import list_changes
from rlm_jax.data.splits import SPLITS, load_split
from rlm_jax.evaluation import build, solver
from rlm_jax.learning.checkpoints import (
    Checkpoints,
    open_checkpoints,
    read_extra,
    restore_checkpoint,
    save_checkpoint,
)
from rlm_jax.learning.export import export_policy
from rlm_jax.learning.metrics_writer import WriteMetrics, open_metrics
from rlm_jax.learning.networks import Networks, init_networks, mean_networks
from rlm_jax.learning.update import accept_updates, find_bad_step, sum_metrics
from rlm_jax.models.load import find_model
from rlm_jax.models.number_embedding import init_number_embeddings
from rlm_jax.reasoning.language_values import needs_state_value
from rlm_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlm_jax.text.train_tokenizer import train_puzzle_tokenizer
from rlm_jax.viz.training import TrainingDisplay, draw_trees, watch_training

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Write TensorBoard's files too.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices to split batches and the model over, as data=8 or data=4,model=2."
)
_FSDP = flags.DEFINE_bool("fsdp", False, "Split the parameters over the mesh's data axis too.")
flags.adopt_module_key_flags(launching)

# Of the split that is looked at during training, and of the trees that are drawn.
EVAL_SPLIT = "countdown4-inputs"
NUM_TREES = 3
TOKENIZER = "tokenizer.model"
# The exit status of a run whose updates are no numbers any more.
NOT_FINITE = 3


class _Outputs(NamedTuple):
    """Where a phase leaves what it does."""

    checkpoints: Checkpoints
    write: WriteMetrics
    display: TrainingDisplay


def main() -> None:
    """Checks the flags, trains, exports."""
    config = launching.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise ValueError("--workdir=DIR is missing: the folder that the run lives in")
    if "train" not in config:
        raise ValueError("the config has no `train`: name one as configs/countdown.py")
    mesh = launching.read_mesh(_MESH.value)
    if _FSDP.value and mesh is None:
        raise ValueError("--fsdp needs --mesh, as in --mesh=data=8")
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    launching.require_folder("workdir", workdir)
    settings = read_settings(config, str(workdir / TOKENIZER), mesh)
    start = _load_start(config["train"]["begin_with"])
    _check_state_value(config, settings, start)
    run = _prepare(config, settings, start, workdir, mesh)
    launching.use_compilation_cache()
    _require_disjoint(run)
    networks = _draw_networks(run) if start is None else phases.take_networks(run, start)
    with catch_stop() as is_stopped:
        for make_phase in phases.list_judging(run.settings):
            found = _run_phase(run, make_phase(run), is_stopped)
            run = run._replace(state_value=found)
        networks = _train_policy(run, networks, is_stopped)
    _export(run, networks)


def _train_policy(run: Run, networks: Networks, is_stopped: Callable[[], bool]) -> Networks:
    """The networks behind all their phases."""
    if run.settings.supervised is not None:
        networks = _run_phase(run, phases.make_supervised(run, networks), is_stopped)
    if run.settings.walking:
        networks = mean_networks(_walk(run, networks, is_stopped))
    if run.settings.search is not None:
        networks = _run_phase(run, phases.make_search(run, networks), is_stopped)
    return networks


def _walk(run: Run, networks: Networks, is_stopped: Callable[[], bool]) -> Iterator[Networks]:
    """The networks at the end of each phase of walks; the next phase donates them."""
    for walking in run.settings.walking:
        networks = _run_phase(run, phases.make_walking(run, walking, networks), is_stopped)
        yield networks


def _load_start(spec: str | None) -> build.Policy | None:
    """The networks that `train.begin_with` names, if any."""
    if spec is None:
        return None
    if not (find_model(spec) / TOKENIZER).is_file():
        raise ValueError(f"train.begin_with={spec}: it has no {TOKENIZER}, as networks here have")
    return build.load_policy(spec)


def _prepare(
    config: dict[str, Any],
    settings: Settings,
    start: build.Policy | None,
    workdir: pathlib.Path,
    mesh: Mesh | None,
) -> Run:
    """Leaves the tokenizer in the run's folder: that of `start`, or one trained for the task."""
    train, path = config["train"], workdir / TOKENIZER
    if not path.exists():
        if start is None:
            train_puzzle_tokenizer(path, bare_numbers=False)
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            with write_whole(path) as beside:
                shutil.copyfile(find_model(train["begin_with"]) / TOKENIZER, beside)
    tokenizer = load_tokenizer(path)
    if settings.search is not None:
        phases.require_room(config, settings.search, tokenizer)
    model = phases.make_model(train["network"], tokenizer) if start is None else start.cfg
    rules = FSDP if _FSDP.value else TENSOR_PARALLEL
    state_value = None if start is None else start.state_value
    solutions = phases.read_solutions(config, tokenizer) if settings.supervised is not None else ()
    return Run(
        config, train, settings, workdir, tokenizer, model, {}, mesh, rules, state_value, solutions
    )


def _check_state_value(
    config: dict[str, Any], settings: Settings, start: build.Policy | None
) -> None:
    """Raises ValueError where a network for states is needed that is not there, or does not fit."""
    asked = settings.state_value
    begun = None if start is None else start.state_value
    if asked is not None and begun is not None:
        # More numbers may have rows of their own than before; all else is as it was.
        for name, has in dataclasses.asdict(begun.cfg).items():
            wants, may_grow = getattr(asked.network, name), name == "num_numbers"
            # Asked or not is what it learns, and no setting of its shape.
            if name != "readout" and (wants < has or (wants > has and not may_grow)):
                accepted = f"at least {has}" if may_grow else has
                raise ValueError(
                    f"train.state_value.network.{name}={wants}: accepted is {accepted}, as the "
                    f"network for states of train.begin_with={config['train']['begin_with']} has it"
                )
    wanted = needs_state_value(config["evaluator"])
    if wanted and asked is None and begun is None:
        raise ValueError(
            f"evaluator {config['evaluator']!r}: accepted with train.state_value.num_steps "
            "above 0, or with a train.begin_with that has a network for states"
        )


def _draw_networks(run: Run) -> Networks:
    """The networks that training begins with."""
    key = jax.random.key(run.train["seed"])
    networks = init_networks(key, run.model, run.settings.head)
    if not run.train["network"]["number_waves"]:
        return networks
    texts = [run.tokenizer.token_bytes(token).strip() for token in range(run.model.vocab_size)]
    numbers = [int(text) if text.isdigit() else -1 for text in texts]
    policy = networks.policy
    embed = init_number_embeddings(jax.random.fold_in(key, 2), policy.embed, numbers)
    return dataclasses.replace(networks, policy=dataclasses.replace(policy, embed=embed))


def _require_disjoint(run: Run) -> None:
    """Refuses to start when a test problem is among what training begins with.

    The generator leaves out all that is held out; this looks whether it does.
    """
    prompts = [_read_prompt(run.tokenizer, example) for example in make_shard(run.settings.mix, 0)]
    learned = [problem_key(prompt) for prompt in prompts]
    if run.settings.state_value is not None:
        learned += list_problems(make_states(run.settings.state_value.mix, 0))
    test = [
        problem_key(notation(problem))
        for split in map(load_split, SPLITS[:1] + SPLITS[-1:])
        if (notation := build.TASKS[split.task].notation) is not None
        for problem, _ in split.examples
    ]
    require_disjoint(
        learned,
        test,
        exact_key=lambda key: key,
        permuted_key=lambda key: key,
        ngram_words=None,
    )


def _read_prompt(tokenizer: Tokenizer, example: TokenExample) -> str:
    return tokenizer.decode(example.tokens.tolist(), skip_special=True).split("\n")[0]


def _run_phase(run: Run, phase: Phase, is_stopped: Callable[[], bool]) -> Any:
    """What a phase has learned at its end.

    Raises:
      SystemExit: an update was refused; the state before it is a checkpoint.
      KeyboardInterrupt: it was stopped before; what it did is a checkpoint.
    """
    try:
        return _finish_phase(run, phase, is_stopped)
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        raise SystemExit(NOT_FINITE) from None


def _finish_phase(run: Run, phase: Phase, is_stopped: Callable[[], bool]) -> Any:
    """As `_run_phase`, but for a refused update it raises FloatingPointError."""
    train, state, position = run.train, phase.state, None
    folder = run.workdir / "checkpoints" / phase.name
    keep_best = train["keep_best"] if phase.evaluates else 0
    with open_checkpoints(
        folder, keep_last=2, keep_best=keep_best, metric=train["best_metric"]
    ) as checkpoints:
        done = checkpoints.latest_step()
        if done is not None:
            _require_same_config(run, read_extra(checkpoints))
            state, extra = restore_checkpoint(checkpoints, state)
            position = extra["position"]
        if done == phase.num_steps:
            return phase.networks(state)
        with (
            open_metrics(
                run.workdir / phase.name,
                restored_step=done,
                tensorboard=_TENSORBOARD.value,
            ) as write,
            watch_training(phase.num_steps) as display,
            contextlib.closing(phase.steps(state, position)) as steps,
        ):
            outputs = _Outputs(checkpoints, write, display)
            state = _take_steps(run, phase, steps, done or 0, outputs, is_stopped)
    if state is None:
        raise KeyboardInterrupt
    return phase.networks(state)


def _take_steps(
    run: Run,
    phase: Phase,
    steps: phases.Steps,
    done: int,
    outputs: _Outputs,
    is_stopped: Callable[[], bool],
) -> Any:
    """The state behind the last step; None when it was stopped before."""
    train, (checkpoints, write, display) = run.train, outputs
    pending: list[Any] = []
    for step in range(done + 1, phase.num_steps + 1):
        state, metrics, num_tokens, position_fn = next(steps)
        pending.append(metrics)
        display.update(step, num_tokens=num_tokens)
        ends, stopped = step == phase.num_steps, is_stopped()
        logs, looks, saves = (
            ends or step % train[f"{name}_steps"] == 0 for name in ("log", "eval", "checkpoint")
        )
        looks &= phase.evaluates
        # Nothing is saved, or looked at, that has refused an update.
        if logs or looks or saves or stopped:
            means = _read(pending)
            if not all(map(math.isfinite, means.values())):
                _refuse(checkpoints, pending, step, state, run, position_fn())
            if logs or stopped:
                write(step, means)
                display.update(step, metrics=_shown(means))
                pending = []
        scores = None
        if looks:
            scores, trees = _evaluate(run, phase.networks(state))
            write(step, scores, {"trees": trees})
            display.update(step, metrics=scores)
        if saves or stopped or (looks and train["keep_best"]):
            _save(checkpoints, step, state, run, position_fn(), scores)
        if ends:
            return state
        if stopped:
            return None
    return None


def _refuse(
    checkpoints: Checkpoints, pending: list[Any], step: int, state: Any, run: Run, position: Any
) -> None:
    """Ends a run at a step whose update was refused, with the networks before it saved.

    Nothing is changed from that step on, so the state is the last good one still. The checkpoint
    bears the number of the refused step, and its data begin behind what was read since.
    """
    bad = find_bad_step(pending, step)
    if bad is None:
        return
    _save(checkpoints, bad.step, accept_updates(state), run, position)
    checkpoints.wait()
    raise FloatingPointError(
        f"{bad.metric} is {bad.value} at step {bad.step}: its update was refused. The networks "
        f"before it are checkpoint {bad.step} in {checkpoints.folder}; the same command goes on "
        "from there, with the data that follow"
    )


def _save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    run: Run,
    position: Any,
    scores: dict[str, float] | None = None,
) -> None:
    used = list_used(run.config, run.settings)
    extra = {"train": run.train, "used": used, "position": position, "command": sys.argv}
    save_checkpoint(checkpoints, step, state, extra, scores)


def _read(pending: list[Any]) -> dict[str, float]:
    """Means of the metrics of several steps; reads the device once."""
    means = {name: value.mean() for name, value in sum_metrics(pending).items()}
    return {name: float(value) for name, value in jax.device_get(means).items()}


def _shown(means: dict[str, float]) -> dict[str, float]:
    names = ("loss", "choice_accuracy", "goal_accuracy", "kl", "search_solved")
    return {name: means[name] for name in names if name in means}


def _evaluate(run: Run, networks: Networks) -> tuple[dict[str, float], str]:
    """Accuracy of a greedy chain and of the search on held-out problems, and some trees."""
    examples = load_split(EVAL_SPLIT).examples[: run.train["eval_problems"]]
    scores, drawn = {}, ""
    for name in ("greedy", run.train["search"]["strategy"]):
        if name not in run.solvers:
            plan = build.plan_strategy(run.config, name)
            rows = min(run.config["batch_size"], len(examples))
            run.solvers[name] = phases.make_solver(run, plan, networks, rows)
        one = phases.with_networks(run, run.solvers[name], networks)
        encoded = [solver.encode(one, problem) for problem, _ in examples]
        records = solver.solve_batch(one, encoded, [gold for _, gold in examples])
        scores[f"{name}_accuracy"] = sum(map(_is_right, records)) / len(records)
        drawn = draw_trees(records, max_trees=NUM_TREES, max_lines=12)
    return scores, drawn


def _is_right(record: dict[str, Any]) -> bool:
    return record["correct"] is True


def _require_same_config(run: Run, saved: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint's run was asked for something else."""
    train, used = json.loads(json.dumps([run.train, list_used(run.config, run.settings)]))
    other = list_changes(saved["train"], {**dict.fromkeys(saved["train"]), **train})
    # Older checkpoints know less of it, or nothing.
    known = saved.get("used", {})
    other += list_changes(known, {name: used[name] for name in used if name in known})
    if other:
        raise ValueError(
            f"--workdir={_WORKDIR.value} holds a run with {', '.join(other)}; give another "
            "--workdir, or the config of that run"
        )


def _find_command(run: Run) -> list[str]:
    """The command that took the last step, which may have been an earlier one."""
    names = list_phases(run.settings)
    if not names:
        return sys.argv
    with open_checkpoints(run.workdir / "checkpoints" / names[-1], read_only=True) as checkpoints:
        return read_extra(checkpoints)["command"]


def _export(run: Run, networks: Networks) -> None:
    folder = run.workdir / "policy"
    export_policy(
        folder,
        networks.policy,
        run.model,
        run.workdir / TOKENIZER,
        value_head=networks.value_head,
        state_value=run.state_value,
        metadata={"command": _find_command(run), "train": json.loads(json.dumps(run.train))},
        overwrite=True,
    )
    print(f"the trained networks are in {folder}")


if __name__ == "__main__":
    launching.launch(main, "stopped; the same command goes on where the last checkpoint was made")
