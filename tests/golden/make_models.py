"""Makes models.npz: logits of transformers on tiny models of each family, and on SmolLM2.

Run with an environment that has torch, transformers and gguf, giving the folder of the GGUF file:

    python tests/golden/make_models.py make FOLDER SmolLM2-135M-Instruct.Q4_1.gguf

The tiny models' weights are not stored: `recipe_tensor` draws each tensor from a generator seeded
by its name, here into a torch model and in the tests into a safetensors folder. Stored are float32
logits of every position at a few vocabulary columns, with the log-sum-exp and the argmax over the
whole vocabulary (for bfloat16 cases the columns only, beside the float32 ones).

    python tests/golden/make_models.py compare FOLDER

loads every sub-folder that `save_hf` wrote from a recipe model (named as its case) and requires
equal tensors and the stored logits.
"""

import json
import pathlib
import sys
import zlib

import numpy as np

OUT = pathlib.Path(__file__).parent / "models.npz"
NUM_COLUMNS = 6
SMOLLM2_TEXTS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May? Let us think step by step. "
    "In May she sold 48 / 2 = 24 clips. Altogether she sold 48 + 24 = 72 clips.",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n"
    "    less = [x for x in items[1:] if x < pivot]\n    more = [x for x in items[1:] if x >= "
    "pivot]\n    return quicksort(less) + [pivot] + quicksort(more)\n",
]
COMMON = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Classic config.json of each case: what the tests feed to config_from_hf.
CASES = {
    "llama": {**COMMON, "model_type": "llama", "rope_theta": 5000.0, "rope_scaling": LLAMA3},
    "qwen2": {
        **COMMON,
        "model_type": "qwen2",
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "qwen2_yarn_windows": {
        **COMMON,
        "model_type": "qwen2",
        "rope_theta": 10_000.0,
        "rope_scaling": YARN,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 12, "rope_theta": 10_000.0},
    "gemma3": {
        **COMMON,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
}
BFLOAT16_CASES = ("llama", "gemma3")


def recipe_tensor(name: str, shape: tuple[int, ...], zero_norms: bool) -> np.ndarray:
    """A tensor of a tiny model, from its Hugging Face name alone (float32)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return np.float32(0.3) * values + np.float32(0 if zero_norms else 1)
    if name.endswith("bias"):
        return np.float32(0.5) * values
    return values * np.float32(1.5 / np.sqrt(shape[-1]))


def golden_tokens(case: str) -> np.ndarray:
    """Token ids [2, 40] of a tiny case."""
    rng = np.random.default_rng(zlib.crc32(f"tokens {case}".encode()))
    return rng.integers(0, COMMON["vocab_size"], (2, 40))


def golden_columns(case: str, vocab_size: int) -> np.ndarray:
    """The vocabulary columns that are stored of a case."""
    rng = np.random.default_rng(zlib.crc32(f"columns {case}".encode()))
    return np.sort(rng.choice(vocab_size, NUM_COLUMNS, replace=False))


def is_gemma(config: dict) -> bool:
    return config["model_type"].startswith("gemma")


def build_model(config: dict, dtype: str):
    """A torch model of a case, filled by the recipe."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    body = json.loads(json.dumps(config))  # transformers changes what it is given
    made = AutoConfig.for_model(body.pop("model_type"), **body)
    # Made in its dtype, not cast to it: a cast would round the rotary frequencies too.
    model = AutoModelForCausalLM.from_config(
        made, attn_implementation="eager", dtype=getattr(torch, dtype)
    ).eval()
    tied = bool(made.tie_word_embeddings)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
            value = recipe_tensor(source, tuple(tensor.shape), is_gemma(config))
            tensor.copy_(torch.from_numpy(value))
    return model


def run(model, tokens: np.ndarray) -> np.ndarray:
    """Logits [R, T, V] in float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def make(folder: str, gguf_file: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arrays = {}
    for case, config in CASES.items():
        columns = golden_columns(case, config["vocab_size"])
        tokens = golden_tokens(case)
        record(arrays, case, run(build_model(config, "float32"), tokens), columns)
        if case in BFLOAT16_CASES:
            logits = run(build_model(config, "bfloat16"), tokens)
            arrays[f"{case}/bfloat16"] = logits[..., columns]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    tokens = np.array([tokenizer(t).input_ids[:64] for t in SMOLLM2_TEXTS])
    assert tokens.shape == (2, 64), tokens.shape
    columns = golden_columns("smollm2", model.config.vocab_size)
    arrays["smollm2/tokens"] = tokens.astype(np.int32)
    record(arrays, "smollm2", run(model, tokens), columns)
    np.savez_compressed(OUT, **arrays)
    print(OUT, OUT.stat().st_size, "bytes")


def record(arrays: dict, case: str, logits: np.ndarray, columns: np.ndarray) -> None:
    wide = logits.astype(np.float64)
    peak = wide.max(-1, keepdims=True)
    arrays[f"{case}/logits"] = logits[..., columns]
    total = np.log(np.exp(wide - peak).sum(-1)) + peak[..., 0]
    arrays[f"{case}/logsumexp"] = total.astype(np.float32)
    arrays[f"{case}/argmax"] = logits.argmax(-1).astype(np.int32)


def compare(folder: str) -> None:
    """Exits with an error unless every saved folder loads in transformers as the same model."""
    import torch
    from transformers import AutoModelForCausalLM

    golden = np.load(OUT)
    for path in sorted(p for p in pathlib.Path(folder).iterdir() if p.is_dir()):
        case = path.name.split("-")[0]
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        for name, tensor in build_model(CASES[case], "float32").state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), (path, name)
        logits = run(model, golden_tokens(case))
        columns = golden_columns(case, CASES[case]["vocab_size"])
        gap = np.abs(logits[..., columns] - golden[f"{case}/logits"]).max()
        print(path.name, "equal tensors, logits within", gap)
        assert gap < 1e-5, gap


if __name__ == "__main__":
    {"make": make, "compare": compare}[sys.argv[1]](*sys.argv[2:])
