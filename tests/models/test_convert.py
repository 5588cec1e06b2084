"""experiments/convert.py as a user runs it."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from gguf_writing import write_gguf

from rlm_jax.models.config_hf import config_from_hf
from rlm_jax.models.gguf import load_gguf, read_gguf_metadata
from rlm_jax.models.hf import load_hf
from rlm_jax.models.state_value import (
    STATE_VALUE,
    StateValueConfig,
    init_state_value,
    load_state_value,
    save_state_value,
)
from rlm_jax.text.tokenizer import load_tokenizer


@pytest.fixture
def convert(root):
    def run(*flags):
        command = [sys.executable, root / "experiments/convert.py", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)

    return run


def test_gguf_to_shards_and_on_to_bfloat16(convert, recipes, recipe_weights, tmp_path):
    cfg = config_from_hf(recipes.CASES["qwen3"])
    write_gguf(tmp_path / "m.gguf", cfg, recipe_weights("qwen3"), "F16")
    out, again = tmp_path / "out", tmp_path / "again"
    done = convert(f"--model={tmp_path / 'm.gguf'}", f"--out={out}", "--max_shard_bytes=20000")
    assert done.returncode == 0, done.stderr
    assert "MB in float32" in done.stdout
    expected, expected_cfg, _ = load_gguf(tmp_path / "m.gguf")
    params, cfg_again, _ = load_hf(out)
    assert cfg_again == expected_cfg
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert len(list(out.glob("*.safetensors"))) > 1

    ours, theirs = load_tokenizer(out), load_tokenizer(read_gguf_metadata(tmp_path / "m.gguf"))
    assert ours.encode("abc!cab") == theirs.encode("abc!cab") != []
    assert (ours.eos_ids, ours.bos_id) == (theirs.eos_ids, theirs.bos_id) == ((2,), 1)
    assert ours.chat_template == theirs.chat_template == "{{ messages[0]['content'] }}"

    shape = StateValueConfig(num_goals=4, num_layers=1, model_dim=8, num_heads=1, ffn_dim=8)
    save_state_value(out, init_state_value(jax.random.key(0), shape))
    done = convert(f"--model={out}", f"--out={again}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    # The network for states goes along, as narrow as the rest.
    wide, narrow = (load_state_value(folder, "bfloat16") for folder in (out, again))
    np.testing.assert_array_equal(wide.trunk.embed, narrow.trunk.embed)
    sizes = [(folder / STATE_VALUE).stat().st_size for folder in (out, again)]
    assert sizes[1] < 0.6 * sizes[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    jax.tree.map(
        np.testing.assert_array_equal, load_hf(again, "bfloat16")[0], load_hf(out, "bfloat16")[0]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "m.gguf", "out"]

    short = tmp_path / "short"
    flags = (f"--model={out}", f"--out={short}", "--dtype=bfloat16", "--significand_bits=5")
    done = convert(*flags)
    assert done.returncode == 0, done.stderr
    params, network = load_hf(short, "bfloat16")[0], load_state_value(short, "bfloat16")
    for array, full in zip(
        jax.tree.leaves((params, network.trunk)),
        jax.tree.leaves((expected, load_state_value(out).trunk)),
        strict=True,
    ):
        array, full = np.asarray(array), np.asarray(full)
        assert not (array.view(np.uint16) & 7).any()
        np.testing.assert_allclose(array.astype(np.float32), full, rtol=2.0**-5)
    # Nearest, not cut off: errors have no sign.
    assert abs(np.mean(array.astype(np.float32) / full - 1)) < 0.2 * 2.0**-5


def test_errors_are_one_line(convert, tmp_path):
    done = convert(f"--model={tmp_path / 'none.gguf'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.startswith("convert.py: ")
    assert "none.gguf" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
