"""A run's checkpoints: bit-equal, on any mesh, and whole at whatever moment the run is killed."""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resumed_run
from jax.sharding import NamedSharding, PartitionSpec

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Array, Float
from rlm_jax.learning.checkpoints import (
    open_checkpoints,
    read_extra,
    restore_checkpoint,
    save_checkpoint,
)


@struct
class Weights:
    """A network of two matrices; `name` is no leaf."""

    first: Float[Array, "2 8"]
    second: tuple[Float[Array, "8"], None]
    name: str = static("tiny")


def make_state(seed=0):
    """Every kind of leaf a run has: struct, optimizer state, keys, replay on device and on host."""
    key = jax.random.key(seed)
    weights = Weights(
        jax.random.normal(key, (2, 8)), (jax.random.normal(key, (8,)).astype(jnp.bfloat16), None)
    )
    return {
        "params": weights,
        "opt_state": optax.adamw(1e-3).init(weights),
        "key": jax.random.split(jax.random.key(seed + 1), (4, 2)),
        "other_key": jax.random.key(seed, impl="rbg"),
        "replay": {
            "tokens": jnp.arange(24, dtype=jnp.int16).reshape(8, 3),
            "done": jnp.arange(8) % 3 == 0,
            "empty": jnp.zeros((0, 3), jnp.int8),
            "no_keys": jax.random.split(key, 0),
        },
        "host": np.array([[np.nan, -0.0], [np.inf, 1e-40]], np.float32),
        "step": jnp.uint32(3),
    }


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(found, expected):
    """Equal to the last bit, of the same types, in the same tree."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape, type(one)) == (other.dtype, other.shape, type(other))
        assert bits(one) == bits(other)


def as_shapes(tree, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    extra = {
        "command": ["train.py", "--seed=1"],
        "config": {"rate": 1e-3, "steps": None, "on": True, "ends": (1, 2)},
        "tokenizer": bytes(range(256)),
        "iterator": {"workers": [b"", b"\xff"], "text": "é\n"},
    }
    state = make_state()
    threads = threading.active_count()
    with open_checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
        assert save_checkpoint(checkpoints, 3, state, extra)
        assert checkpoints.latest_step() == 3
        found, beside = restore_checkpoint(checkpoints, make_state(seed=9))
        assert_same(found, state)
        assert beside == {**extra, "config": {**extra["config"], "ends": [1, 2]}}
    assert threading.active_count() == threads
    with open_checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        found, _ = restore_checkpoint(checkpoints, make_state(seed=9), step=3)
        assert_same(found, state)
        assert read_extra(checkpoints) == beside
        with pytest.raises(ValueError, match="opened to be read"):
            save_checkpoint(checkpoints, 4, state, {})
    # Randomness goes on where it was.
    assert_same(jax.random.normal(found["key"][1, 0]), jax.random.normal(state["key"][1, 0]))


def test_shapes_alone_suffice_and_leave_arrays_free(tmp_path):
    state = make_state()
    del state["host"]
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, 0, state, {})
        found, _ = restore_checkpoint(checkpoints, as_shapes(state))
    assert_same(found, state)
    mesh = make_mesh()
    whole = jax.device_put(np.zeros((2, 8)), NamedSharding(mesh, PartitionSpec()))
    assert (found["params"].first + whole).sharding.mesh == mesh


def test_part_of_a_state_is_read_alone(tmp_path):
    state = make_state()
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, 1, state, {"a": 1})
        found, extra = restore_checkpoint(checkpoints, make_state(5)["params"], part="params")
        assert_same(found, state["params"])
        assert extra == {"a": 1}
        found, _ = restore_checkpoint(checkpoints, jnp.uint32(0), part="step")
        assert_same(found, state["step"])
        with pytest.raises(ValueError, match=r"param\.first is not in it"):
            restore_checkpoint(checkpoints, state["params"], part="param")
        with pytest.raises(ValueError, match=r"params\.second\.0 is in it, and there is no place"):
            restore_checkpoint(checkpoints, {"first": state["params"].first}, part="params")


def test_a_state_moves_to_another_mesh(tmp_path):
    first, second = (
        make_mesh(data=4, model=2),
        make_mesh(data=2, model=1, devices=jax.devices()[:2]),
    )
    old, new = NamedSharding(first, PartitionSpec("data", "model")), PartitionSpec(None, "data")
    tokens = jax.device_put(jnp.arange(64.0).reshape(8, 8), old)
    keys = jax.device_put(
        jax.random.split(jax.random.key(0), 8), NamedSharding(first, PartitionSpec("data"))
    )
    empty = jax.device_put(jnp.zeros((0, 8)), old)
    state = {"tokens": tokens, "keys": keys, "empty": empty}
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, 0, state, {})
        like = as_shapes(state, NamedSharding(second, PartitionSpec()))
        like["tokens"] = jax.ShapeDtypeStruct(
            (8, 8), jnp.float32, sharding=NamedSharding(second, new)
        )
        moved, _ = restore_checkpoint(checkpoints, like)
        back, _ = restore_checkpoint(checkpoints, state)
    for name, leaf in moved.items():
        assert bits(leaf) == bits(state[name])
        assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)
    assert moved["tokens"].addressable_shards[0].data.shape == (8, 4)
    assert_same(back, state)
    assert back["keys"].sharding.is_equivalent_to(state["keys"].sharding, 1)


def test_what_is_saved_is_the_state_of_the_call(tmp_path):
    """Buffers may be donated and arrays overwritten while the writing goes on."""
    step_fn = jax.jit(lambda x: x * 0.5 + 1, donate_argnums=0)
    state = {"device": jnp.arange(2_000_000.0), "host": np.arange(2_000_000.0)}
    with open_checkpoints(tmp_path, keep_last=9) as checkpoints:
        expected = {}
        for step in range(3):
            expected[step] = jax.tree.map(np.array, state)
            save_checkpoint(checkpoints, step, state, {})
            for _ in range(3):
                state["device"] = step_fn(state["device"])
                state["host"] *= 0.5
        for step, arrays in expected.items():
            found, _ = restore_checkpoint(checkpoints, state, step)
            assert bits(found["device"]) == bits(arrays["device"])
            assert bits(found["host"]) == bits(arrays["host"])


@pytest.mark.parametrize(
    ("larger_is_better", "kept", "best"), [(True, [2, 5, 8, 9], 2), (False, [1, 4, 8, 9], 4)]
)
def test_the_last_and_the_best_stay(tmp_path, larger_is_better, kept, best):
    accuracy = [0.5, 0.1, 0.9, None, 0.1, 0.8, np.nan, 0.3, 0.7, np.inf]

    def open_them(**kw):
        return open_checkpoints(
            tmp_path,
            keep_last=2,
            keep_best=2,
            metric="accuracy",
            larger_is_better=larger_is_better,
            **kw,
        )

    for half in (range(5), range(5, 10)):  # What was best is known after a restart.
        with open_them() as checkpoints:
            for step in half:
                metrics = None if accuracy[step] is None else {"accuracy": accuracy[step], "x": 1}
                save_checkpoint(checkpoints, step, {"w": jnp.float32(step)}, {}, metrics)
    with open_them(read_only=True) as checkpoints:
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == best
        found, _ = restore_checkpoint(checkpoints, {"w": jnp.float32(0)}, checkpoints.best_step())
        assert float(found["w"]) == best
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept


def test_a_step_is_saved_once_and_in_order(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert save_checkpoint(checkpoints, 5, {"w": jnp.zeros(2)}, {})
        assert not save_checkpoint(checkpoints, 5, {"w": jnp.ones(2)}, {})
        with pytest.raises(ValueError, match="step 4 is before step 5, which is saved"):
            save_checkpoint(checkpoints, 4, {"w": jnp.ones(2)}, {})
        found, _ = restore_checkpoint(checkpoints, {"w": jnp.ones(2)})
        assert found["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "new": jnp.zeros(2)}, r"new is not in it; wanted is float32\[2\]"),
        (lambda s: {"key": s["key"]}, r"opt\.0 is in it, and there is no place for it"),
        (
            lambda s: {**s, "opt": (jnp.zeros((3, 2)),)},
            r"opt\.0 is float32\[2, 3\], wanted is float32\[3, 2\]",
        ),
        (
            lambda s: {**s, "opt": (s["opt"][0].astype(jnp.bfloat16),)},
            r"opt\.0 is float32.* bfloat16",
        ),
        (
            lambda s: {**s, "key": jax.random.key_data(s["key"])},
            r"key is key<fry>\[\], wanted is uint32",
        ),
        (
            lambda s: {**s, "key": jax.random.key(0, impl="rbg")},
            r"key is key<fry>\[\], wanted is key<rbg>",
        ),
    ],
)
def test_another_tree_is_refused_by_its_first_leaf(tmp_path, change, message):
    state = {"key": jax.random.key(0), "opt": (jnp.zeros((2, 3)),)}
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, 1, state, {})
        with pytest.raises(ValueError, match=f"{tmp_path.name} step 1: {message}"):
            restore_checkpoint(checkpoints, change(state))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        open_checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
            restore_checkpoint(checkpoints, {})
        for step in (3, 4):
            save_checkpoint(checkpoints, step, {"w": jnp.zeros(1)}, {})
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 7, only 3, 4"):
            read_extra(checkpoints, 7)


def test_bad_arguments_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for kw, message in [
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_best": -1}, "keep_best=-1"),
        ({"keep_best": 1}, "needs the name of a metric"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_checkpoints(tmp_path / "new", **kw)
    with pytest.raises(ValueError, match="is a file"):
        open_checkpoints(tmp_path / "file")
    with open_checkpoints(tmp_path / "new") as checkpoints:
        for state, extra, message in [
            ({"w": 1.0}, {}, "w is float: accepted are"),
            ({"w": np.array(["a"])}, {}, "w has dtype <U1: accepted are"),
            ({}, {}, "nothing to save"),
            ({"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, {}, r"two leaves .* 'a\.b'"),
            ({"w": jnp.zeros(1)}, {"a": [1, {"b": float("nan")}]}, r"extra\.a\[1\]\.b is nan"),
            ({"w": jnp.zeros(1)}, {"a": {1: 2}}, r"extra\.a has the name 1"),
            ({"w": jnp.zeros(1)}, {"a": object()}, r"extra\.a is <object"),
        ]:
            with pytest.raises(ValueError, match=message):
                save_checkpoint(checkpoints, 1, state, extra)
        assert checkpoints.steps() == []


def test_a_checkpoint_runs_nothing(tmp_path, monkeypatch):
    def refuse(*args, **kw):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    state = make_state()
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, 1, state, {"a": b"1"})
        checkpoints.wait()
        # What a file says of its reader is not believed.
        path = tmp_path / "1" / "_CHECKPOINT_METADATA"
        about = json.loads(path.read_text())
        about["item_handlers"] = dict.fromkeys(about["item_handlers"], "os.system")
        path.write_text(json.dumps(about))
    with open_checkpoints(tmp_path) as checkpoints:
        found, _ = restore_checkpoint(checkpoints, state)
    assert_same(found, state)


def test_the_log_of_a_program_is_its_own(tmp_path):
    records = []
    handler, logger = logging.Handler(), logging.getLogger("absl")
    handler.emit, level = records.append, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with open_checkpoints(tmp_path) as checkpoints:
            save_checkpoint(checkpoints, 1, {"w": jnp.zeros(1)}, {})
            restore_checkpoint(checkpoints, {"w": jnp.zeros(1)})
        with open_checkpoints(tmp_path, read_only=True) as checkpoints:
            read_extra(checkpoints)
        logger.info("of the program")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [record.getMessage() for record in records] == ["of the program"]


@pytest.mark.parametrize("damage", ["about", "arrays", "foreign", "cut"])
def test_damage_is_one_error(tmp_path, damage):
    state = {"w": jnp.arange(1000.0)}
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, 1, state, {})
    if damage == "cut":
        largest = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
        os.truncate(largest, 10)
    elif damage == "foreign":
        (tmp_path / "1" / "about").rename(tmp_path / "1" / "model")
    else:
        for path in (tmp_path / "1" / damage).rglob("*"):
            if path.is_file():
                path.write_bytes(b"{")
    said = pytest.raises(ValueError, match="step 1: not a readable checkpoint")
    with open_checkpoints(tmp_path) as checkpoints, said:
        restore_checkpoint(checkpoints, state)


@pytest.mark.parametrize("gone", ["about", "arrays", "_CHECKPOINT_METADATA", "."])
def test_a_step_half_deleted_is_in_nobodys_way(tmp_path, gone):
    """A run killed while an old step was being deleted goes on, and deletes the rest of it."""
    state = {"w": jnp.arange(9.0)}

    def open_them(**kw):
        return open_checkpoints(tmp_path, keep_last=1, keep_best=1, metric="a", **kw)

    with open_them() as checkpoints:
        for step in (1, 2):
            save_checkpoint(checkpoints, step, state, {}, {"a": step})
    (tmp_path / "1").mkdir()
    for name in {"about", "arrays", "_CHECKPOINT_METADATA"} - {gone}:
        if gone != ".":
            copy = shutil.copytree if (tmp_path / "2" / name).is_dir() else shutil.copy
            copy(tmp_path / "2" / name, tmp_path / "1" / name)
    for read_only in (True, False):
        with open_them(read_only=read_only) as checkpoints:
            assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 2)
            assert_same(restore_checkpoint(checkpoints, state)[0], state)
            if not read_only:
                save_checkpoint(checkpoints, 3, state, {}, {"a": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def kill_during_a_save(folder, num_steps, seconds):
    """Runs on from the last step and kills the run in its second save, so long after it began."""
    command = [sys.executable, resumed_run.__file__, folder, str(num_steps)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        seen = set()
        while len(seen) < 2 and child.poll() is None:
            names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            seen |= {name for name in names if "orbax-checkpoint-tmp" in name}
            time.sleep(0.001)
        time.sleep(seconds)
    finally:
        child.send_signal(signal.SIGKILL)
        errors = child.communicate()[1]
    assert child.returncode == -signal.SIGKILL, errors
    return [path.name for path in folder.iterdir() if not path.name.isdecimal()]


@pytest.mark.slow
def test_killed_runs_end_where_an_undisturbed_one_does(tmp_path):
    """kill -9 in the middle of a save: the step before is whole, and the run goes on from it."""
    num_steps, folder = 9, tmp_path / "killed"
    unfinished = []
    for seconds in (0.0, 0.02, 0.05):
        unfinished += kill_during_a_save(folder, num_steps, seconds)
        with open_checkpoints(folder, read_only=True) as checkpoints:
            assert 0 < checkpoints.latest_step() < num_steps
    assert unfinished  # At least one kill was in time.
    resumed_run.run(folder, num_steps)
    assert sorted(path.name for path in folder.iterdir()) == [str(num_steps - 1), str(num_steps)]
    with open_checkpoints(folder) as checkpoints:
        found, _ = restore_checkpoint(checkpoints, resumed_run.start())
    state = resumed_run.start()
    step_fn = jax.jit(resumed_run.advance)
    for _ in range(num_steps):
        state = step_fn(state)
    assert_same(found, state)
