"""Trains a policy and a value network from scratch on a puzzle, then by their own search.

    python experiments/train.py --config=configs/countdown.py --workdir=DIR

First supervised, on demonstrations by an exact solver; then, for `train.search.num_steps` steps,
search -> train -> search inside one compiled step. DIR holds everything: the tokenizer,
checkpoints, metrics.jsonl, TensorBoard's files and, at the end, the networks in DIR/policy, which
solve.py and evaluate.py load. The same command started again, after Ctrl-C, SIGTERM, kill -9 or a
power cut, goes on where it stopped and ends on the same parameters, bit for bit.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import launching
import numpy as np
from absl import flags
from ml_collections import config_flags

from rlm_jax.data.countdown import CountdownMix, draw_problems, make_shard, make_shards, problem_key
from rlm_jax.data.examples import TokenExample
from rlm_jax.data.generated import GeneratedSource
from rlm_jax.data.iterators import make_batches
from rlm_jax.data.overlap import require_disjoint
from rlm_jax.data.packing import Packed
from rlm_jax.data.records import list_changes
from rlm_jax.data.splits import SPLITS, load_split
from rlm_jax.evaluation import build, solver
from rlm_jax.evaluation.prompts import encode_problem, pad_prompts
from rlm_jax.learning.checkpoints import (
    Checkpoints,
    open_checkpoints,
    read_extra,
    restore_checkpoint,
    save_checkpoint,
)
from rlm_jax.learning.collect import CollectConfig
from rlm_jax.learning.export import export_policy
from rlm_jax.learning.metrics_writer import open_metrics
from rlm_jax.learning.networks import LossConfig, Networks, init_networks, token_loss
from rlm_jax.learning.search_step import (
    SearchStepConfig,
    init_search_state,
    make_collect,
    make_search_step,
)
from rlm_jax.learning.stopping import catch_stop
from rlm_jax.learning.update import (
    Loss,
    OptimizerConfig,
    init_state,
    make_optimizer,
    require_finite,
    sum_metrics,
    update_state,
)
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import HeadConfig
from rlm_jax.models.number_embedding import init_number_embeddings
from rlm_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlm_jax.text.train_tokenizer import train_puzzle_tokenizer
from rlm_jax.viz.training import draw_trees, watch_training

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Write TensorBoard's files too.")
flags.adopt_module_key_flags(launching)

# More than any run reads: position, not count, is what a resumed run needs.
NUM_SHARDS = 1 << 20
# Of the split that is looked at during training, and of the trees that are drawn.
EVAL_SPLIT = "countdown4-inputs"
NUM_TREES = 3


class Run(NamedTuple):
    """What both phases need. config: the whole file; train: its part for training. solvers: of the
    evaluations, compiled once."""

    config: dict[str, Any]
    train: dict[str, Any]
    workdir: pathlib.Path
    tokenizer: Tokenizer
    model: ModelConfig
    loss: Loss
    solvers: dict[str, solver.Solver]


# Yields (state, metrics, tokens, position_fn) of one update after another.
Steps = Generator[tuple[Any, Any, int, Callable[[], Any]]]


class Phase(NamedTuple):
    """A loop of updates: `steps(state, position)` yields (state, metrics, tokens, position_fn).

    name: of its checkpoints' folder and its metrics. position: where its data stands, in JSON; None
    at the beginning, and told by `position_fn()` until the next update.
    networks: the part of the state that is learned.
    """

    name: str
    num_steps: int
    state: Any
    steps: Callable[[Any, Any], Steps]
    networks: Callable[[Any], Networks]


def main() -> None:
    """Checks the flags, trains, exports."""
    config = launching.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise ValueError("--workdir=DIR is missing: the folder that the run lives in")
    if "train" not in config:
        raise ValueError("the config has no `train`: name one as configs/countdown.py")
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    launching.use_compilation_cache()
    run = _prepare(config, workdir)
    _require_disjoint(run)
    networks = _draw_networks(run)
    with catch_stop() as is_stopped:
        phases = (
            (run.train["num_steps"], _make_supervised),
            (run.train["search"]["num_steps"], _make_search),
        )
        for num_steps, make_phase in phases:
            if not num_steps:
                continue
            networks = _run_phase(run, make_phase(run, networks), is_stopped)
            if networks is None:
                print("stopped; the same command goes on from the last checkpoint")
                return
    _export(run, networks)


def _prepare(config: dict[str, Any], workdir: pathlib.Path) -> Run:
    train = config["train"]
    path = workdir / "tokenizer.model"
    if not path.exists():
        train_puzzle_tokenizer(path, bare_numbers=False)
    tokenizer = load_tokenizer(path)
    network = train["network"]
    model = ModelConfig(
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
    loss = functools.partial(token_loss, model=model, cfg=LossConfig(**train["loss"]))
    return Run(config, train, workdir, tokenizer, model, loss, {})


def _draw_networks(run: Run) -> Networks:
    """The networks that training begins with."""
    key = jax.random.key(run.train["seed"])
    networks = init_networks(key, run.model, HeadConfig((), "sigmoid"))
    if not run.train["network"]["number_waves"]:
        return networks
    texts = [run.tokenizer.token_bytes(token).strip() for token in range(run.model.vocab_size)]
    numbers = [int(text) if text.isdigit() else -1 for text in texts]
    policy = networks.policy
    embed = init_number_embeddings(jax.random.fold_in(key, 2), policy.embed, numbers)
    return dataclasses.replace(networks, policy=dataclasses.replace(policy, embed=embed))


def _mix(run: Run) -> CountdownMix:
    data = {**run.train["data"], "sizes": _as_sizes(run.train["data"]["sizes"])}
    return CountdownMix(str(run.workdir / "tokenizer.model"), run.train["seed"], **data)


def _require_disjoint(run: Run) -> None:
    """Refuses to start when a test problem is among what training begins with.

    The generator leaves out all that is held out; this looks whether it does.
    """
    prompts = [_read_prompt(run.tokenizer, example) for example in make_shard(_mix(run), 0)]
    test = [
        problem_key(notation(problem))
        for split in map(load_split, SPLITS[:1] + SPLITS[-1:])
        if (notation := build.TASKS[split.task].notation) is not None
        for problem, _ in split.examples
    ]
    require_disjoint(
        map(problem_key, prompts),
        test,
        exact_key=lambda key: key,
        permuted_key=lambda key: key,
        ngram_words=None,
    )


def _read_prompt(tokenizer: Tokenizer, example: TokenExample) -> str:
    prompt = example.tokens[: int(np.argmax(example.loss_weight > 0))].tolist()
    return tokenizer.decode(prompt, skip_special=True)


def _make_supervised(run: Run, networks: Networks) -> Phase:
    """Cross-entropy and values on demonstrations, made while the training goes on."""
    train = run.train
    optimizer = make_optimizer(
        OptimizerConfig(num_steps=train["num_steps"], **train["optimizer"]), networks
    )
    update = jax.jit(
        functools.partial(
            update_state,
            loss=run.loss,
            optimizer=optimizer,
            num_microbatches=train["num_microbatches"],
        ),
        donate_argnums=0,
    )

    def steps(state: Any, position: Any) -> Steps:
        mix = _mix(run)
        source = GeneratedSource(
            make_shards(mix), num_shards=NUM_SHARDS, shard_examples=mix.shard_examples
        )
        with contextlib.closing(source):
            batches = make_batches(
                source, Packed(**train["layout"]), seed=mix.seed, shuffle=False, too_long="drop"
            )
            if position is not None:
                batches.set_state(position)
            while True:
                before = batches.counts.tokens
                state, metrics = update(state, next(batches))
                yield state, metrics, batches.counts.tokens - before, batches.get_state

    state = init_state(networks, optimizer)
    return Phase("supervised", train["num_steps"], state, steps, lambda state: state.params)


def _make_search(run: Run, networks: Networks) -> Phase:
    """Search and learning in one compiled step, on problems without solutions."""
    search = run.train["search"]
    plan = build.plan_strategy({**run.config, "batch_size": 1}, search["strategy"])
    policy = _as_policy(run, networks)
    one = build.build_solver(run.config, plan, policy, seed=run.train["seed"], batch_size=1)
    optimizer = make_optimizer(
        OptimizerConfig(
            num_steps=search["num_steps"] * search["step"]["num_updates"],
            **search["optimizer"],
        ),
        networks,
    )
    collect = make_collect(
        one.lm,
        language=one.language,
        strategy=one.strategy,
        cfg=CollectConfig(
            num_children=one.strategy.num_children,
            max_depth=one.language.max_depth,
            **search["collect"],
        ),
        budget_tokens=search["budget_tokens"],
    )
    cfg = SearchStepConfig(**search["step"])
    step_fn = make_search_step(collect, cfg=cfg, loss=run.loss, optimizer=optimizer)

    def draw(number: int) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng([run.train["seed"], 1, number])
        problems = draw_problems(rng, search["num_problems"], _as_sizes(search["sizes"]))
        prompts = [encode_problem(run.tokenizer, one.task, problem) for problem in problems]
        tokens, lengths = pad_prompts(prompts, run.config["bucket_tokens"])
        keys = jax.random.split(jax.random.key(number), len(problems))
        return keys, jnp.asarray(tokens), jnp.asarray(lengths)

    def steps(state: Any, position: Any) -> Steps:
        number = 0 if position is None else position
        while True:
            state, metrics = step_fn(state, *draw(number))
            number += 1
            yield state, metrics, 0, functools.partial(int, number)

    state = init_search_state(
        init_state(networks, optimizer), jax.random.key(run.train["seed"]), collect, draw(0), cfg
    )
    return Phase("search", search["num_steps"], state, steps, lambda state: state.train.params)


def _run_phase(run: Run, phase: Phase, is_stopped: Callable[[], bool]) -> Networks | None:
    """The networks at the end of a phase, None when it was stopped before."""
    train, state, position = run.train, phase.state, None
    folder = run.workdir / "checkpoints" / phase.name
    with open_checkpoints(folder, keep_last=2) as checkpoints:
        done = checkpoints.latest_step()
        if done is not None:
            _require_same_config(train, read_extra(checkpoints)["train"])
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
        ):
            pending: list[Any] = []
            steps = phase.steps(state, position)
            for step in range((done or 0) + 1, phase.num_steps + 1):
                state, metrics, num_tokens, position_fn = next(steps)
                pending.append(metrics)
                display.update(step, num_tokens=num_tokens)
                ends = step == phase.num_steps
                if step % train["log_steps"] == 0 or ends or is_stopped():
                    means = _read(pending)
                    write(step, means)
                    display.update(step, metrics=_shown(means))
                    require_finite(means, step)
                    pending = []
                if step % train["eval_steps"] == 0 or ends:
                    scores, trees = _evaluate(run, phase.networks(state))
                    write(step, scores, {"trees": trees})
                    display.update(step, metrics=scores)
                if step % train["checkpoint_steps"] == 0 or ends or is_stopped():
                    _save(checkpoints, step, state, train, position_fn())
                if is_stopped() and not ends:
                    steps.close()
                    return None
            steps.close()
    return phase.networks(state)


def _save(checkpoints: Checkpoints, step: int, state: Any, train: Any, position: Any) -> None:
    extra = {"train": train, "position": position, "command": sys.argv}
    save_checkpoint(checkpoints, step, state, extra)


def _read(pending: list[Any]) -> dict[str, float]:
    """Means of the metrics of several steps; reads the device once."""
    means = {name: value.mean() for name, value in sum_metrics(pending).items()}
    return {name: float(value) for name, value in jax.device_get(means).items()}


def _shown(means: dict[str, float]) -> dict[str, float]:
    names = ("loss", "choice_accuracy", "search_solved")
    return {name: means[name] for name in names if name in means}


def _evaluate(run: Run, networks: Networks) -> tuple[dict[str, float], str]:
    """Accuracy of a greedy chain and of the search on held-out problems, and some trees."""
    examples = load_split(EVAL_SPLIT).examples[: run.train["eval_problems"]]
    scores, drawn = {}, ""
    for name in ("greedy", run.train["search"]["strategy"]):
        if name not in run.solvers:
            run.solvers[name] = build.build_solver(
                run.config,
                build.plan_strategy(run.config, name),
                _as_policy(run, networks),
                seed=0,
                batch_size=min(run.config["batch_size"], len(examples)),
            )
        one = run.solvers[name]
        lm = dataclasses.replace(one.lm, policy=networks.policy, value_head=networks.value_head)
        one = dataclasses.replace(one, lm=lm)
        encoded = [solver.encode(one, problem) for problem, _ in examples]
        records = solver.solve_batch(one, encoded, [gold for _, gold in examples])
        scores[f"{name}_accuracy"] = sum(map(_is_right, records)) / len(records)
        drawn = draw_trees(records, max_trees=NUM_TREES, max_lines=12)
    return scores, drawn


def _is_right(record: dict[str, Any]) -> bool:
    return record["correct"] is True


def _as_policy(run: Run, networks: Networks) -> build.Policy:
    return build.Policy(
        networks.policy, run.model, run.tokenizer, networks.value_head, str(run.workdir)
    )


def _require_same_config(now: dict[str, Any], saved: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    other = list_changes(saved, {**dict.fromkeys(saved), **now})
    if other:
        raise ValueError(
            f"--workdir={_WORKDIR.value} holds a run with {', '.join(other)}; give another "
            "--workdir, or the config of that run"
        )


def _as_sizes(sizes: Any) -> tuple[tuple[int, float], ...]:
    return tuple((int(size), float(share)) for size, share in sizes)


def _export(run: Run, networks: Networks) -> None:
    folder = run.workdir / "policy"
    export_policy(
        folder,
        networks.policy,
        run.model,
        run.workdir / "tokenizer.model",
        value_head=networks.value_head,
        metadata={"command": sys.argv, "train": json.loads(json.dumps(run.train))},
        overwrite=True,
    )
    print(f"the trained networks are in {folder}")


if __name__ == "__main__":
    launching.launch(main, "stopped; the same command goes on where the last checkpoint was made")
