"""Tiny recipe models of each family, as transformers saw them when it made the goldens."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlm_jax.models.checkpoint import described_shapes
from rlm_jax.models.config_hf import config_from_hf
from rlm_jax.models.hf import hf_name

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def recipes():
    """The module tests/golden/make_models.py: cases, weight recipe, tokens, columns."""
    spec = importlib.util.spec_from_file_location("make_models", GOLDEN / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden_logits():
    """What transformers computed: arrays named "case/logits", "case/logsumexp", ..."""
    with np.load(GOLDEN / "models.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def recipe_weights(recipes):
    """case -> {parameter name: float32 array}, each drawn by its Hugging Face name."""

    def make(case: str) -> dict[str, np.ndarray]:
        config = recipes.CASES[case]
        cfg = config_from_hf(config)
        return {
            name: recipes.recipe_tensor(hf_name(name, cfg), shape, recipes.is_gemma(config))
            for name, shape in described_shapes(cfg)
        }

    return make


@pytest.fixture(scope="session")
def recipe_folders(recipes, recipe_weights, tmp_path_factory):
    """case -> folder in Hugging Face layout, written by the safetensors package."""
    made: dict[str, pathlib.Path] = {}

    def make(case: str) -> pathlib.Path:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            config = recipes.CASES[case]
            cfg = config_from_hf(config)
            arrays = {hf_name(name, cfg): a for name, a in recipe_weights(case).items()}
            save_file(arrays, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config))
            made[case] = folder
        return made[case]

    return make
