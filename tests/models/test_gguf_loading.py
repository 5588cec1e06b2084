"""GGUF: every family's conventions, every quantisation, and files that lie."""

import dataclasses
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_writing import TOKENS, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm_jax.models.checkpoint import described_shapes
from rlm_jax.models.config import RopeScaling
from rlm_jax.models.config_hf import config_from_hf
from rlm_jax.models.gguf import load_gguf, open_gguf, read_gguf_metadata
from rlm_jax.models.gguf_file import read_gguf_file
from rlm_jax.models.params import param_path
from rlm_jax.models.presets import preset

# What gguf.quants can write itself; the K-quants are tested on random blocks below.
WRITABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_QUANTS = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def gguf_config(recipes, case):
    """The case's config as far as GGUF can say it (its own constants for the rest)."""
    cfg = config_from_hf(recipes.CASES[case])
    if case == "llama":  # the file's factors imply the context that Llama-3 was trained with
        scaling = dataclasses.replace(cfg.rope_scaling, original_context=8192)
        return dataclasses.replace(cfg, rope_scaling=scaling, rope_theta=500_000.0)
    if case == "gemma3":
        pattern = (True,) * cfg.num_layers  # five windowed layers come before the first full one
        return dataclasses.replace(cfg, sliding_pattern=pattern[:1], attn_scale=16.0)
    return cfg


def by_name(params):
    return {
        param_path(p): np.asarray(a) for p, a in jax.tree_util.tree_flatten_with_path(params)[0]
    }


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma3"])
def test_conventions_of_each_family_are_undone(case, recipes, recipe_weights, tmp_path):
    cfg, weights = gguf_config(recipes, case), recipe_weights(case)
    write_gguf(tmp_path / "m.gguf", cfg, weights)
    params, loaded, metadata = load_gguf(tmp_path / "m.gguf")
    assert loaded == cfg
    assert metadata["tokenizer.ggml.tokens"] == TOKENS
    arrays = by_name(params)
    assert set(arrays) == set(weights)
    for name, expected in weights.items():
        # Adding 1 to a norm weight and taking it off again rounds in float32.
        atol = 1e-6 if case == "gemma3" and name.endswith("norm") else 0
        np.testing.assert_allclose(arrays[name], expected, rtol=0, atol=atol, err_msg=name)


def test_yarn_metadata(recipes, recipe_weights, tmp_path):
    scaling = RopeScaling("yarn", 4.0, original_context=64, attention_factor=1.1386294361119891)
    cfg = dataclasses.replace(gguf_config(recipes, "qwen2"), rope_scaling=scaling)
    write_gguf(tmp_path / "m.gguf", cfg, recipe_weights("qwen2"))
    assert open_gguf(tmp_path / "m.gguf").cfg == cfg


@pytest.mark.parametrize("type_name", WRITABLE)
def test_each_writable_quantisation(type_name, recipes, recipe_weights, tmp_path):
    cfg = dataclasses.replace(gguf_config(recipes, "qwen3"), head_dim=16, ffn_dim=64)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in described_shapes(cfg)
    }
    write_gguf(tmp_path / "m.gguf", cfg, weights, type_name)
    params, _, _ = load_gguf(tmp_path / "m.gguf", jnp.bfloat16)
    exact, _, _ = load_gguf(tmp_path / "m.gguf")
    assert params.embed.dtype == jnp.bfloat16
    kind = gguf.GGMLQuantizationType[type_name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights["embed"], kind), kind)
    np.testing.assert_array_equal(exact.embed, expected.astype(np.float32))
    np.testing.assert_array_equal(params.embed, np.asarray(expected).astype(jnp.bfloat16))
    error = np.abs(np.asarray(exact.layers[1].w_down) - weights["layers.1.w_down"]).max()
    assert error <= {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.02}.get(type_name, 0.4)


@pytest.mark.parametrize("type_name", sorted(K_QUANTS))
def test_k_quants_from_random_blocks(type_name, tmp_path):
    """gguf cannot quantise these: random valid blocks, against gguf's own dequantizer, and for
    Q6_K against the published layout."""
    cfg = dataclasses.replace(preset("tiny-llama"), model_dim=256, rope_scaling=RopeScaling())
    cfg = dataclasses.replace(cfg, ffn_dim=256, num_heads=8, num_kv_heads=8, head_dim=32)
    cfg = dataclasses.replace(cfg, vocab_size=80, num_layers=1, tie_embeddings=True)
    kind, rng = gguf.GGMLQuantizationType[type_name], np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    names = [name for name, _ in described_shapes(cfg)]
    weights = {n: np.ones(s, np.float32) for n, s in described_shapes(cfg) if n != "embed"}
    assert set(names) - set(weights) == {"embed"}
    blocks = rng.integers(0, 256, (80, K_QUANTS[type_name]), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (80, 2)).astype(np.float16).view(np.uint8)
    if type_name == "Q6_K":
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    write_with_raw(path, cfg, weights, "token_embd.weight", blocks, kind)
    params, _, _ = load_gguf(path)
    expected = gguf.quants.dequantize(blocks, kind)
    np.testing.assert_array_equal(params.embed, expected)
    assert np.isfinite(expected).all()
    assert np.std(expected) > 0
    if type_name == "Q6_K":
        np.testing.assert_allclose(expected[0], dequantize_q6_k(blocks[0]), rtol=1e-6)


def write_with_raw(path, cfg, weights, name, blocks, kind):
    original = gguf.GGUFWriter.write_header_to_file

    def with_blocks(writer, *args, **kwargs):
        writer.add_tensor(name, blocks, raw_dtype=kind)
        return original(writer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_blocks)
        write_gguf(path, cfg, weights)


def dequantize_q6_k(block):
    """One Q6_K block by its definition: 128 low nibbles, 64 high pairs, 16 int8 scales, fp16."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales = block[192:208].view(np.int8).astype(float)
    out = np.zeros(256)
    for i in range(256):
        half, within = divmod(i, 128)
        quarter, lane = divmod(within, 32)
        byte = low[half * 64 + (quarter % 2) * 32 + lane]
        nibble = byte >> 4 if quarter >= 2 else byte & 15
        pair = (high[half * 32 + lane] >> (2 * quarter)) & 3
        out[i] = scales[half * 8 + within // 16] * ((nibble | pair << 4) - 32)
    return out * float(block[208:210].view(np.float16)[0])


def test_metadata_values_have_plain_types(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("s", "žluťoučký 🐎")
    writer.add_bool("b", True)
    writer.add_int8("i8", -3)
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_array("names", ["a", "", "č"])
    writer.add_array("numbers", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_gguf_metadata(tmp_path / "m.gguf")
    assert metadata["s"] == "žluťoučký 🐎"
    assert metadata["b"] is True
    assert (metadata["i8"], metadata["u64"], metadata["f64"]) == (-3, 2**63, 0.1)
    assert metadata["names"] == ["a", "", "č"]
    np.testing.assert_array_equal(metadata["numbers"], [1, 2, 3])


@pytest.fixture(scope="module")
def good(recipes, recipe_weights, tmp_path_factory):
    """Bytes of a small valid file with a tiny vocabulary, and its parsed header."""
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    cfg = dataclasses.replace(gguf_config(recipes, "llama"), num_layers=1)
    weights = {n: a for n, a in recipe_weights("llama").items() if not n.startswith("layers.1")}
    write_gguf(path, cfg, weights, "F16")
    return path.read_bytes(), read_gguf_file(path)


def test_header_equals_the_gguf_package(good, tmp_path):
    (tmp_path / "m.gguf").write_bytes(good[0])
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors, metadata = good[1].tensors, good[1].metadata
    assert {t.name for t in reader.tensors} == set(tensors)
    for tensor in reader.tensors:
        entry = tensors[tensor.name]
        assert (entry.offset, entry.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert {
        k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()
    } == fields


def check_loads_or_refuses(path, data):
    path.write_bytes(data)
    message = ""
    try:
        load_gguf(path)
    except ValueError as error:
        message = str(error)
    assert not message or (str(path) in message and "\n" not in message)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_flipped_bytes_give_a_model_or_a_value_error(data, good, tmp_path):
    raw, header = good
    first = min(t.offset for t in header.tensors.values())
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly in the header: a flip in a weight is another valid file.
        at = data.draw(st.integers(0, first) | st.integers(0, len(raw) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    check_loads_or_refuses(tmp_path / "m.gguf", bytes(damaged))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_truncated_files_are_refused(data, good, tmp_path):
    raw, _ = good
    (tmp_path / "m.gguf").write_bytes(raw[: data.draw(st.integers(0, len(raw) - 64))])
    with pytest.raises(ValueError, match=r"m\.gguf"):
        load_gguf(tmp_path / "m.gguf")


def value_bytes(kind, payload, key=b"k"):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload


def header_bytes(*parts, tensors=0, values=1, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, values) + b"".join(parts) + b"\0" * 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"\x80\x04" + b"x" * 60, "magic"),
        (header_bytes(magic=b"GGML"), "magic"),
        (header_bytes(version=7), "version 7"),
        (header_bytes(version=0x03000000), "big-endian"),
        (header_bytes(tensors=2**63, values=0), "cannot fit"),
        (header_bytes(values=2**40), "cannot fit"),
        (header_bytes(value_bytes(8, struct.pack("<Q", 2**62))), "inside an entry"),
        (header_bytes(value_bytes(9, struct.pack("<IQ", 4, 2**61))), "inside an entry"),
        (header_bytes(value_bytes(9, struct.pack("<IQ", 8, 2**61))), "past the end"),
        (header_bytes(value_bytes(9, struct.pack("<IQ", 9, 1))), "unsupported array"),
        (header_bytes(value_bytes(99, b"")), "unknown value type 99"),
        (header_bytes(value_bytes(0, b"a"), value_bytes(0, b"b"), values=2), "occurs twice"),
        (header_bytes(value_bytes(0, b"a", b"\xff")), "not UTF-8"),
        (header_bytes(value_bytes(2, b"\2\0", b"split.count")), "split"),
        (header_bytes(value_bytes(4, b"\0\0\0\0", b"general.alignment")), "alignment"),
        (header_bytes(value_bytes(0, b"a")), "unsupported architecture None"),
    ],
)
def test_hostile_headers(data, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def tensor_bytes(name, dims, kind=0, offset=0):
    dims = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([tensor_bytes(b"a", (2**40, 2**40))], "truncated"),
        ([tensor_bytes(b"a", (4,), offset=2**60)], "truncated"),
        ([tensor_bytes(b"a", (0,))], r"shape \(0,\)"),
        ([tensor_bytes(b"a", (2, 2, 2, 2, 2))], "5 dimensions"),
        ([tensor_bytes(b"a", (33,), kind=2)], r"\(Q4_0\) has shape \(33,\)"),
        ([tensor_bytes(b"a", (4,)), tensor_bytes(b"a", (4,), offset=32)], "occurs twice"),
        ([tensor_bytes(b"a", (4,)), tensor_bytes(b"b", (4,), offset=8)], "overlaps"),
    ],
)
def test_hostile_tensor_directories(entries, message, tmp_path):
    data = header_bytes(*entries, tensors=len(entries), values=0) + b"\0" * 256
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_gguf_file(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "layers.0.wq"}, r"layers\.0\.wq is missing"),
        ({"shape": "layers.0.w_up"}, r"layers\.0\.w_up is \[47, 32\], expected \[48, 32\]"),
        ({"add": "blk.0.attn_sinks.weight"}, r"unsupported tensor 'blk\.0\.attn_sinks\.weight'"),
        ({"add": "blk.0.attn_q.bias"}, r"unsupported tensor 'blk\.0\.attn_q\.bias'"),
        ({"add": "blk.7.attn_q.weight"}, r"unsupported tensor 'blk\.7\.attn_q\.weight'"),
        ({"layers": 3}, r"no tensor blk\.2\."),
        ({"quantise": 16}, "unsupported quantisation type 16: accepted F32, F16"),
        ({"factors": True}, "does not follow the Llama-3 rule"),
    ],
)
def test_mislabelled_models(change, message, recipes, recipe_weights, tmp_path, monkeypatch):
    cfg, weights = gguf_config(recipes, "llama"), recipe_weights("llama")
    if "drop" in change:
        del weights[change["drop"]]
    if "shape" in change:
        weights[change["shape"]] = weights[change["shape"]][:-1]
    if "layers" in change:
        cfg = dataclasses.replace(cfg, num_layers=change["layers"])
    if "factors" in change:
        monkeypatch.setattr("gguf_writing.llama3_factors", lambda b, s: np.linspace(1, 8, len(b)))
    if "add" in change:
        write_with_raw(
            tmp_path / "m.gguf", cfg, weights, change["add"], np.ones(4, np.float32), None
        )
    else:
        write_gguf(tmp_path / "m.gguf", cfg, weights)
    if "quantise" in change:
        data = bytearray((tmp_path / "m.gguf").read_bytes())
        # Behind the name stand the number of dimensions, two dimensions, and the type.
        at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
        assert data[at : at + 4] == struct.pack("<I", 0)
        data[at : at + 4] = struct.pack("<I", change["quantise"])
        (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="is not a file"):
        load_gguf(tmp_path)


def test_unsupported_dtype(good, tmp_path):
    (tmp_path / "m.gguf").write_bytes(good[0])
    with pytest.raises(ValueError, match=r"'int8' is not supported.*bfloat16"):
        load_gguf(tmp_path / "m.gguf", "int8")
