"""A policy goes out and comes back: the same logits, values, tokens and words about itself."""

import dataclasses
import json
import shutil
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.sharding import shard_tree
from rlm_jax.learning.export import export_policy
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.heads import HeadConfig, apply_value_head, init_value_head
from rlm_jax.models.load import load_model
from rlm_jax.models.params import init_params, param_axes
from rlm_jax.models.presets import preset
from rlm_jax.models.state_value import StateValueConfig, init_state_value
from rlm_jax.models.transformer import forward, unembed
from rlm_jax.text.tokenizer import load_tokenizer

CFG = preset("tiny-qwen3")
METADATA = {"command": "train.py --seed=1", "figures": {"greedy": 0.71, "n": [1000, 1000]}}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A SentencePiece model of 64 pieces, with a mark that ends a step."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [f"{a} + {b} = {a + b} {string.ascii_lowercase}" for a in range(9) for b in range(9)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "countdown"),
        vocab_size=64,
        hard_vocab_limit=False,
        split_digits=True,
        user_defined_symbols=["<eois>"],
        minloglevel=2,
    )
    return folder / "countdown.model"


@pytest.fixture(scope="module")
def policy():
    keys = jax.random.split(jax.random.key(0))
    head = init_value_head(keys[1], CFG.model_dim, HeadConfig((16,), "signed_sigmoid"))
    return init_params(keys[0], CFG), head


@jax.jit
def judge(params, head, tokens):
    """Logits and values at every token."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(params, tokens, positions, cfg=CFG, attend=make_dense_attend(CFG))
    return unembed(params, hidden, cfg=CFG), apply_value_head(head, hidden)


def test_a_policy_comes_back_as_it_was(policy, tokenizer_file, tmp_path):
    params, head = policy
    cfg = StateValueConfig(num_goals=4, num_layers=1, model_dim=8, num_heads=1, ffn_dim=8)
    network = init_state_value(jax.random.key(2), cfg)
    folder = export_policy(
        tmp_path / "policy",
        params,
        CFG,
        tokenizer_file,
        value_head=head,
        state_value=network,
        metadata=METADATA,
    )
    loaded = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.state_value, network)
    assert loaded.cfg == CFG
    assert loaded.metadata["rlm_jax"] == METADATA
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    for one, other in zip(
        judge(params, head, tokens), judge(loaded.params, loaded.value_head, tokens), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    ours, theirs = load_tokenizer(loaded.tokenizer_source), load_tokenizer(tokenizer_file)
    ids = ours.encode("12 + 3 = 15<eois>")
    assert ids == theirs.encode("12 + 3 = 15<eois>")
    assert ours.decode(ids) == "12 + 3 = 15<eois>"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "state_value.safetensors",
        "tokenizer.model",
        "value_head.safetensors",
    ]


def test_sharded_and_narrow_weights_go_out(policy, tokenizer_file, tmp_path):
    params, _ = policy
    mesh = make_mesh(data=4, model=2)
    spread = shard_tree(mesh, params, param_axes(CFG, num_shards=2))
    assert not spread.embed.is_fully_replicated
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        export_policy(folder, spread, CFG, tokenizer_file, dtype=dtype)
        narrow = jax.tree.map(lambda leaf, to=dtype: np.asarray(leaf).astype(jnp.dtype(to)), params)
        loaded = load_model(folder, dtype)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, narrow)
        assert loaded.value_head is None
        assert loaded.state_value is None
    sizes = [
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "bfloat16")
    ]
    assert sizes[0] > 1.9 * sizes[1]


def test_all_files_of_a_tokenizers_folder_go_along(policy, tokenizer_file, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    (source / "config.json").write_text("{}")
    export_policy(tmp_path / "out", policy[0], CFG, source)
    assert load_tokenizer(tmp_path / "out").chat_template == "{{ 1 }}"
    # A better policy takes the place of the last one.
    export_policy(tmp_path / "out", policy[0], CFG, source, metadata={"n": 2}, overwrite=True)
    assert load_model(tmp_path / "out").metadata["rlm_jax"] == {"n": 2}


def test_what_does_not_fit_is_refused_and_nothing_is_written(policy, tokenizer_file, tmp_path):
    params, _ = policy
    small = dataclasses.replace(CFG, vocab_size=32)
    other_head = init_value_head(jax.random.key(0), 8, HeadConfig())
    for kw, message in [
        (
            {"cfg": preset("tiny-llama")},
            r"layers\.0\.wq is \[48, 32\], in the config it is \[32, 32\]",
        ),
        ({"cfg": preset("tiny-qwen2")}, "in the config it is"),
        (
            {"params": init_params(jax.random.key(0), small), "cfg": small},
            "tokens do not fit a vocab",
        ),
        ({"value_head": other_head}, "reads a width of 8, the policy's is 32"),
        ({"metadata": {"loss": float("nan")}}, "metadata is not JSON"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ]:
        arguments = {"params": params, "cfg": CFG, "tokenizer": tokenizer_file} | kw
        with pytest.raises(ValueError, match=message):
            export_policy(tmp_path / "out", **arguments)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        export_policy(tmp_path / "out", params, CFG, tmp_path / "none.model")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes").touch()
    with pytest.raises(ValueError, match="is not empty"):
        export_policy(tmp_path / "busy", params, CFG, tokenizer_file)
    assert [path.name for path in tmp_path.iterdir()] == ["busy"]
