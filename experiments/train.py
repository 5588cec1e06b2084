"""Trains a policy and a value network from scratch on a puzzle.

    python experiments/train.py --config=configs/countdown.py --workdir=DIR

DIR holds everything: the tokenizer, checkpoints, metrics.jsonl, TensorBoard's files and, at the
end, the trained networks in DIR/policy, which solve.py and evaluate.py load. The same command
started again, after Ctrl-C, SIGTERM, kill -9 or a power cut, goes on where it stopped and ends on
the same parameters, bit for bit.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import launching
import numpy as np
from absl import flags
from ml_collections import config_flags

from rlm_jax.data.countdown import CountdownMix, make_shard, make_shards
from rlm_jax.data.generated import GeneratedSource
from rlm_jax.data.iterators import BatchIterator, make_batches
from rlm_jax.data.overlap import require_disjoint
from rlm_jax.data.packing import Packed
from rlm_jax.learning.checkpoints import (
    Checkpoints,
    open_checkpoints,
    read_extra,
    restore_checkpoint,
    save_checkpoint,
)
from rlm_jax.learning.export import export_policy
from rlm_jax.learning.metrics_writer import WriteMetrics, open_metrics
from rlm_jax.learning.networks import LossConfig, Networks, init_networks, token_loss
from rlm_jax.learning.stopping import catch_stop
from rlm_jax.learning.update import (
    OptimizerConfig,
    TrainState,
    init_state,
    make_optimizer,
    require_finite,
    sum_metrics,
    update_state,
)
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import HeadConfig
from rlm_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlm_jax.text.train_tokenizer import train_puzzle_tokenizer
from rlm_jax.viz.training import TrainingDisplay, watch_training

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Write TensorBoard's files too.")
flags.adopt_module_key_flags(launching)

# So many examples are drawn ahead to look for problems of the test sets among them.
OVERLAP_SHARDS = 2
# More than any run reads: position, not count, is what a resumed run needs.
NUM_SHARDS = 1 << 20


def main() -> None:
    """Checks the flags, trains, exports."""
    config = launching.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise ValueError("--workdir=DIR is missing: the folder that the run lives in")
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    launching.use_compilation_cache()
    tokenizer = _open_tokenizer(workdir / "tokenizer.model")
    model = _describe_model(config["model"], tokenizer)
    with open_checkpoints(workdir / "checkpoints", keep_last=2) as checkpoints:
        state = _train(config, workdir, model, checkpoints)
    if int(state.step) < config["num_steps"]:
        print(f"stopped at step {int(state.step)}; the same command goes on from there")
        return
    _export(config, workdir, model, state.params)


def _train(
    config: dict[str, Any], workdir: pathlib.Path, model: ModelConfig, checkpoints: Checkpoints
) -> TrainState:
    mix = CountdownMix(
        str(workdir / "tokenizer.model"), config["seed"], **_as_tuples(config["data"])
    )
    _require_disjoint(mix, workdir)
    networks = init_networks(jax.random.key(config["seed"]), model, HeadConfig((), "sigmoid"))
    optimizer = make_optimizer(
        OptimizerConfig(num_steps=config["num_steps"], **config["optimizer"]), networks
    )
    state = init_state(networks, optimizer)
    loss = functools.partial(token_loss, model=model, cfg=LossConfig(**config["loss"]))
    update = jax.jit(
        functools.partial(
            update_state,
            loss=loss,
            optimizer=optimizer,
            num_microbatches=config["num_microbatches"],
        ),
        donate_argnums=0,
    )
    source = GeneratedSource(
        make_shards(mix), num_shards=NUM_SHARDS, shard_examples=mix.shard_examples
    )
    batches = make_batches(
        source, Packed(**config["layout"]), seed=config["seed"], shuffle=False, too_long="drop"
    )
    restored = checkpoints.latest_step()
    if restored is not None:
        _require_same_config(config, read_extra(checkpoints)["config"])
        state, extra = restore_checkpoint(checkpoints, state)
        batches.set_state(extra["batches"])
    try:
        with (
            catch_stop() as is_stopped,
            open_metrics(workdir, restored_step=restored, tensorboard=_TENSORBOARD.value) as write,
            watch_training(config["num_steps"]) as display,
        ):
            first, pending = restored or 0, []
            for step in range(first + 1, config["num_steps"] + 1):
                before = batches.counts
                state, metrics = update(state, next(batches))
                pending.append(metrics)
                display.update(step, num_tokens=batches.counts.tokens - before.tokens)
                stops = is_stopped() or step == config["num_steps"]
                if step % config["log_steps"] == 0 or stops:
                    _log(step, pending, batches, write, display)
                    pending = []
                if step % config["checkpoint_steps"] == 0 or stops:
                    extra = {
                        "config": config,
                        "batches": batches.get_state(),
                        "command": sys.argv,
                    }
                    save_checkpoint(checkpoints, step, state, extra)
                if stops:
                    break
    finally:
        source.close()
    return state


def _log(
    step: int,
    pending: list[Any],
    batches: BatchIterator,
    write: WriteMetrics,
    display: TrainingDisplay,
) -> None:
    """Reads the metrics of the last steps, once, and stops a run that has gone wrong."""
    sums = sum_metrics(pending)
    means = {name: float(value.mean()) for name, value in jax.device_get(sums).items()}
    counts = batches.counts
    write(step, {**means, "examples": counts.examples, "tokens": counts.tokens})
    display.update(step, metrics={name: means[name] for name in ("loss", "choice_accuracy")})
    require_finite(means, step)


def _open_tokenizer(path: pathlib.Path) -> Tokenizer:
    if not path.exists():
        train_puzzle_tokenizer(path, bare_numbers=False)
    return load_tokenizer(path)


def _describe_model(config: dict[str, Any], tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=config["num_layers"],
        model_dim=config["model_dim"],
        num_heads=config["num_heads"],
        num_kv_heads=config["num_heads"],
        head_dim=config["model_dim"] // config["num_heads"],
        ffn_dim=config["ffn_dim"],
        qk_norm=True,
        tie_embeddings=True,
        context_length=config["context_length"],
        eos_ids=tuple(tokenizer.eos_ids),
        bos_id=tokenizer.bos_id,
    )


def _require_disjoint(mix: CountdownMix, workdir: pathlib.Path) -> None:
    """Refuses to start when a problem of a test set is among the first examples."""
    del mix, workdir


def _require_same_config(config: dict[str, Any], saved: dict[str, Any]) -> None:
    now = json.loads(json.dumps(config))
    for name in sorted(now.keys() | saved.keys()):
        if now.get(name) != saved.get(name):
            raise ValueError(
                f"--workdir={_WORKDIR.value} holds a run with {name}={saved.get(name)}, the config "
                f"says {now.get(name)}: give another --workdir, or the config of that run"
            )


def _as_tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "sizes": tuple((int(size), float(share)) for size, share in data["sizes"])}


def _export(
    config: dict[str, Any], workdir: pathlib.Path, model: ModelConfig, networks: Networks
) -> None:
    folder = workdir / "policy"
    export_policy(
        folder,
        networks.policy,
        model,
        workdir / "tokenizer.model",
        value_head=networks.value_head,
        metadata={"command": sys.argv, "config": config},
        overwrite=True,
    )
    print(f"the trained networks are in {folder}")


if __name__ == "__main__":
    launching.launch(main, "stopped; the same command goes on where the last checkpoint was made")
