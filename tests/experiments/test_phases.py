"""The phases of train.py on a mesh: what they learn first is what one device learns."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.sharding import FSDP, TENSOR_PARALLEL
from rlm_jax.learning.networks import init_networks
from rlm_jax.text.tokenizer import load_tokenizer
from rlm_jax.text.train_tokenizer import train_puzzle_tokenizer

pytest.importorskip("grain")
ROOT = pathlib.Path(__file__).parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_mesh_learns_from_demonstrations_what_one_device_learns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    phases = _load("experiments/phases.py")
    training_settings = _load("experiments/training_settings.py")
    config = _load("configs/countdown.py").get_config("smoke").to_dict()
    config["train"]["optimizer"]["name"] = "adamw"
    # Products in bfloat16 differ by more, for another order of their sums.
    config["train"]["loss"]["matmul_dtype"] = "float32"
    path = tmp_path / "tokenizer.model"
    train_puzzle_tokenizer(path, bare_numbers=False)
    tokenizer = load_tokenizer(path)
    model = phases.make_model(config["train"]["network"], tokenizer)
    found = {}
    for name, mesh, rules in (
        ("one", None, TENSOR_PARALLEL),
        ("eight", make_mesh(replica=2, data=2, model=2), FSDP),
    ):
        settings = training_settings.read_settings(config, str(path), mesh)
        run = phases.Run(
            config, config["train"], settings, tmp_path, tokenizer, model, {}, mesh, rules
        )
        networks = init_networks(jax.random.key(0), model, settings.head)
        phase = phases.make_supervised(run, networks)
        steps = phase.steps(phase.state, None)
        metrics = [next(steps)[1] for _ in range(2)]
        state = next(steps)[0]
        steps.close()
        found[name] = metrics, phase.networks(state), phase.networks(phase.state)
    (plain, one, _), (spread, eight, start) = found.values()
    for here, there in zip(plain, spread, strict=True):
        for name, value in here.items():
            mean = float(there[name].mean())
            assert mean == pytest.approx(float(value.mean()), abs=1e-5), name
    # The parameters stay where they were put: split over two axes.
    wq, placed = eight.policy.layers[0].wq, start.policy.layers[0].wq.sharding
    assert wq.sharding == placed
    assert wq.addressable_shards[0].data.size * 4 == wq.size
    np.testing.assert_allclose(np.asarray(wq), np.asarray(one.policy.layers[0].wq), atol=1e-4)
