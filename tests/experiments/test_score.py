"""experiments/score.py: its JSON against a plain forward pass, and what it refuses."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ROOT

from rlm_jax.evaluation import build
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.config_hf import config_from_hf
from rlm_jax.models.heads import HeadConfig, apply_value_head, init_value_head, save_value_head
from rlm_jax.models.hf import hf_name, save_hf
from rlm_jax.models.params import describe, param_path
from rlm_jax.models.transformer import forward, unembed
from rlm_jax.text.bpe import tokenizer_json_from_gguf

TINY = "--model=random:tiny-llama"
KEYS = (
    "model",
    "num_tokens",
    "token_ids",
    "logprobs",
    "topk",
    "values",
    "total_logprob",
    "perplexity",
)


def parse(done):
    """The one JSON object that a run printed."""
    assert (done.status, done.err) == (0, "")
    assert done.out.count("\n") == 1
    found = json.loads(done.out, parse_constant=lambda name: pytest.fail(name))
    assert tuple(found) == KEYS
    assert found["num_tokens"] == len(found["token_ids"])
    for name in ("logprobs", "topk"):
        assert len(found[name]) == found["num_tokens"]
        assert found[name][0] is None
    return found


def forward_plainly(policy, ids):
    """Log-probabilities [T, V] behind each token and hidden states [T, D], without padding."""

    @jax.jit
    def run(params, tokens):
        positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
        attend = make_dense_attend(policy.cfg)
        hidden, _ = forward(params, tokens, positions, cfg=policy.cfg, attend=attend)
        logits = unembed(params, hidden, cfg=policy.cfg)
        return jax.nn.log_softmax(logits, -1)[0], hidden[0]

    logprobs, hidden = run(policy.params, jnp.asarray([ids], jnp.int32))
    return np.asarray(logprobs), hidden


def check(found, policy, num_top):
    """Compares a run's JSON with the plain forward pass of the same ids."""
    ids = found["token_ids"]
    expected, _ = forward_plainly(policy, ids)
    chosen = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found["logprobs"][1:], chosen, atol=1e-4)
    assert found["total_logprob"] == pytest.approx(chosen.sum(), abs=1e-3)
    assert found["perplexity"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    for place, before in zip(found["topk"][1:], expected, strict=False):
        best = np.sort(before)[::-1][:num_top]
        np.testing.assert_allclose([one["logprob"] for one in place], best, atol=1e-4)
        np.testing.assert_allclose(before[[one["id"] for one in place]], best, atol=1e-4)
        assert len({one["id"] for one in place}) == num_top


@pytest.mark.parametrize("num_tokens", [2, 63, 64, 65])
def test_scores_equal_a_plain_forward_pass(score, num_tokens):
    text = ("Natalia sold clips to 48 of her friends in April, é and then " * 2)[: num_tokens - 1]
    text = text.ljust(num_tokens - len(text.encode()) + len(text), "!")
    found = parse(score(TINY, f"--text={text}", "--topk=3"))
    assert found["token_ids"] == list(text.encode())
    assert found["num_tokens"] == num_tokens
    assert (found["model"], found["values"]) == ("random:tiny-llama", None)
    check(found, build.load_policy("random:tiny-llama"), num_top=3)


def test_five_alternatives_by_default_and_their_texts(score):
    found = parse(score(TINY, "--text=Hi"))
    assert len(found["topk"][1]) == 5
    for one in found["topk"][1]:
        assert one["token"] == bytes([one["id"]]).decode(errors="replace")


def test_a_single_token_has_nothing_to_predict(score):
    found = parse(score(TINY, "--text=x"))
    assert (found["logprobs"], found["topk"]) == ([None], [None])
    assert (found["total_logprob"], found["perplexity"]) == (0.0, None)


def test_a_file_is_scored_byte_for_byte(score, tmp_path):
    data = "\ufeffé\r\n\n  x\t\n".encode()
    (tmp_path / "text.txt").write_bytes(data)
    assert parse(score(TINY, f"--file={tmp_path}/text.txt"))["token_ids"] == list(data)


def test_a_config_names_the_model_too(score):
    flags = ("--config=configs/smollm2.py:smoke", "--text=a text")
    assert parse(score(*flags)) == parse(score(TINY, "--text=a text"))
    half = parse(score(*flags, "--dtype=bfloat16"))["logprobs"][1:]
    whole = parse(score(*flags))["logprobs"][1:]
    assert half != whole
    np.testing.assert_allclose(half, whole, atol=0.2)


def test_rounded_weights_score_nearly_the_same_and_are_named(score):
    flags = ("--config=configs/smollm2.py:smoke", "--text=a text")
    whole = parse(score(*flags))
    rounded = parse(score(*flags, "--quantize=int8"))
    assert rounded == parse(score(*flags, "--config.quantize=int8"))
    assert rounded["model"] == f"{whole['model']} (int8)"
    assert rounded["logprobs"] != whole["logprobs"]
    np.testing.assert_allclose(rounded["logprobs"][1:], whole["logprobs"][1:], atol=0.2)


def test_control_tokens_are_text_unless_asked_for(score):
    assert parse(score(TINY, "--text=a<eos>"))["token_ids"] == list(b"a<eos>")
    assert parse(score(TINY, "--text=a<eos>", "--special"))["token_ids"] == [97, 257]


def test_a_text_as_long_as_the_context_and_one_token_more(score, tmp_path):
    (tmp_path / "text").write_text(2049 * "x")
    assert_refused(
        score(TINY, f"--file={tmp_path}/text"),
        "the text has 2049 tokens; the context of the model is 2048",
    )
    (tmp_path / "text").write_text(2048 * "x")
    assert parse(score(TINY, f"--file={tmp_path}/text", "--topk=1"))["num_tokens"] == 2048


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model in Hugging Face layout with a tokenizer that adds <bos>, and a value head."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    recipes, writing = load_tests("golden/make_models"), load_tests("models/gguf_writing")
    config = recipes.CASES["qwen3"]
    cfg = config_from_hf(config)
    params = build_params(recipes, config, cfg)
    save_hf(folder, params, cfg)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": writing.TOKENS,
        "tokenizer.ggml.token_type": [1, 3, 3, *[1] * 77],
        "tokenizer.ggml.merges": writing.MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    (folder / "tokenizer.json").write_text(tokenizer_json_from_gguf(metadata))
    special = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    head = init_value_head(jax.random.key(0), cfg.model_dim, HeadConfig((8,), "signed_sigmoid"))
    save_value_head(folder, head)
    return folder


def load_tests(name):
    path = ROOT / "tests" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_params(recipes, config, cfg):
    def draw(path, spec):
        name = hf_name(param_path(path), cfg)
        return jnp.asarray(recipes.recipe_tensor(name, spec.shape, recipes.is_gemma(config)))

    return jax.tree_util.tree_map_with_path(draw, describe(cfg))


def test_a_folder_with_bos_and_a_value_head(score, model_folder):
    found = parse(score(f"--model={model_folder}", "--text=abc!", "--topk=2"))
    policy = build.load_policy(str(model_folder))
    assert found["token_ids"] == [1, *policy.tokenizer.encode("abc!")]
    assert policy.tokenizer.decode(found["token_ids"]) == "<bos>abc!"
    check(found, policy, num_top=2)
    _, hidden = forward_plainly(policy, found["token_ids"])
    values = apply_value_head(policy.value_head, hidden)
    np.testing.assert_allclose(found["values"], values, atol=1e-5)
    assert len(set(found["values"])) == len(found["values"])
    texts = {one["id"]: one["token"] for place in found["topk"][1:] for one in place}
    assert all(policy.tokenizer.decode([id]) == text for id, text in texts.items())


def test_smollm2_agrees_with_transformers(score, smollm2_gguf, root):
    """Token ids, and the likeliest token at every place; logits are compared in tests/models."""
    recipes = load_tests("golden/make_models")
    with np.load(root / "tests/golden/models.npz", allow_pickle=False) as golden:
        tokens, argmax = golden["smollm2/tokens"][0], golden["smollm2/argmax"][0]
    text = recipes.SMOLLM2_TEXTS[0]
    found = parse(score("--config=configs/smollm2.py", f"--text={text}", "--topk=2"))
    count = len(tokens)
    assert found["token_ids"][:count] == tokens.tolist()
    decided = 0
    for place, best in zip(found["topk"][1 : count + 1], argmax, strict=False):
        first, second = place
        if first["logprob"] - second["logprob"] > 0.01:
            assert first["id"] == best
            decided += 1
    assert decided > count - 5
    for logprob, token, place in zip(
        found["logprobs"][1:], found["token_ids"][1:], found["topk"][1:], strict=True
    ):
        for one in place:
            assert one["id"] != token or one["logprob"] == logprob


def assert_refused(done, message):
    """Status 2, nothing printed but one line that says what is wrong."""
    assert done.status == 2
    assert re.fullmatch(rf"score\.py: [^\n]*{message}[^\n]*\n", done.err), done.err
    assert done.out == ""


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([TINY], "no text given: accepted is --text=TEXT or --file=FILE"),
        ([TINY, "--text=x", "--file=y"], "--text and --file are given"),
        ([TINY, "--text="], "--text is empty"),
        ([TINY, "--text=a\udcffb"], r"--text is not UTF-8 \(byte 2\)"),
        ([TINY, "--file=none.txt"], "--file=none.txt: there is no such file"),
        ([TINY, "--file=configs"], "--file=configs is a folder"),
        (["--text=x"], "no model given: accepted is --model=SPEC or --config=FILE"),
        ([TINY, "--config=configs/smollm2.py", "--text=x"], "--config and --model are given"),
        (["--config=configs/none.py", "--text=x"], "there is no file 'configs/none.py'"),
        (["--config=configs/smollm2.py:huge", "--text=x"], "huge: accepted is smoke"),
        ([TINY, "--text=x", "--topk=0"], "--topk=0: 0 is not a positive integer"),
        ([TINY, "--text=x", "--topk=five"], "--topk=five: invalid literal"),
        ([TINY, "--txt=x"], "flag 'txt'"),
        ([TINY, "--text=x", "y"], "not a flag: 'y'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_any_work(score, flags, message):
    assert_refused(score(*flags), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "text.txt is empty"), (b"a\xffb", r"text.txt is not UTF-8 \(byte 2\)")],
)
def test_a_file_that_is_no_text_is_one_line(score, no_model, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    assert_refused(score(TINY, f"--file={tmp_path}/text.txt"), message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=none/such.gguf"], "'none/such.gguf' names no model: accepted are"),
        (["--model="], "an empty name names no model"),
        (["--model=configs"], "configs/config.json: no such config"),
        (["--model=README.md"], "README.md: not a model"),
        (["--model=random:huge"], "'huge': accepted"),
        ([TINY, "--dtype=int8"], "dtype 'int8' is not supported"),
        ([TINY, "--quantize=int4"], "quantize 'int4': accepted are 'int8' or None"),
        ([TINY, "--topk=260"], "--topk=260: the vocabulary has 259 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_that_does_not_fit_is_one_line(score, flags, message):
    assert_refused(score("--text=x", *flags), message)
