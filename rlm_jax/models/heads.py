"""Value heads: from hidden states to one number per token, as pure functions of parameters.

A head is a stack of dense layers with ReLU between them and a squashing function at the end, or a
histogram whose mean is the value (`histogram.py`). No hidden layer gives the plain linear head;
hidden widths (1024, 256) with 2 sigmoid(x) - 1 give the head of x1, the reference implementation of
"Reasoning Language Models: A Blueprint" (arXiv 2501.11223, app. C). Everything is float32 whatever
the dtype of the hidden states: a bfloat16 head moves the values that a search compares.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Array, Float, Float32, Key
from rlm_jax.models.histogram import Histogram, read_out
from rlm_jax.models.params import ParamSpec, init_specs, normal_init, zeros_init
from rlm_jax.models.tensor_file import TensorFile, write_tensors
from rlm_jax.models.transformer import linear

SQUASHES = ("none", "tanh", "sigmoid", "signed_sigmoid")
VALUE_HEAD = "value_head.safetensors"
X1_HIDDEN = (1024, 256)


@struct
class Dense:
    """One dense layer; the weight is stored [out, in]."""

    weight: Float[Array, "out in_"]
    bias: Float[Array, "out"]


@struct
class ValueHead:
    """Dense layers of a value head, and its squashing function or its histogram.

    The last layer is of width 1, or has an output for each bin.
    """

    layers: tuple[Dense, ...]
    squash: str = static("none")
    histogram: Histogram | None = static(None)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of a value head: widths of its hidden layers, and what bounds its output.

    squash: "none"; "tanh" (-1, 1); "sigmoid" (0, 1); "signed_sigmoid" 2 sigmoid(x) - 1 (-1, 1).
    histogram: bins of a categorical head, which its own range bounds (squash "none").
    """

    hidden: tuple[int, ...] = ()
    squash: str = "tanh"
    histogram: Histogram | None = None

    def __post_init__(self):
        if self.squash not in SQUASHES:
            raise ValueError(f"squash {self.squash!r}: accepted {SQUASHES}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be positive, got {self.hidden}")
        if self.histogram is not None and self.squash != "none":
            raise ValueError(f"squash {self.squash!r} with a histogram: accepted is 'none'")

    @property
    def num_outputs(self) -> int:
        """Width of the last layer."""
        return 1 if self.histogram is None else self.histogram.num_bins


X1_HEAD = HeadConfig(X1_HIDDEN, "signed_sigmoid")


def describe_value_head(model_dim: int, cfg: HeadConfig, dtype: Any = jnp.float32) -> ValueHead:
    """The head's description: a `ValueHead` whose leaves are `ParamSpec`."""
    widths = (model_dim, *cfg.hidden, cfg.num_outputs)
    layers = []
    for i in range(len(widths) - 1):
        rows, columns = widths[i + 1], widths[i]
        axis = "embed" if i == 0 else None
        weight: Any = ParamSpec((rows, columns), dtype, (None, axis), normal_init(columns**-0.5))
        bias: Any = ParamSpec((rows,), dtype, (None,), zeros_init)
        layers.append(Dense(weight, bias))
    return ValueHead(tuple(layers), cfg.squash, cfg.histogram)


def init_value_head(
    key: Key[Array, ""], model_dim: int, cfg: HeadConfig, dtype: Any = jnp.float32
) -> ValueHead:
    """Draws a head's parameters."""
    return init_specs(key, describe_value_head(model_dim, cfg, dtype))


@jax.named_scope("value_head")
def value_logits(
    head: ValueHead, hidden: Float[Array, "*rows D"]
) -> Float32[Array, "*rows outputs"]:
    """The last layer's outputs at every token, for losses on logits (`learning/values.py`)."""
    x = hidden.astype(jnp.float32)
    for i, layer in enumerate(head.layers):
        x = jax.nn.relu(x) if i else x
        x = linear(x, layer.weight.astype(jnp.float32)) + layer.bias.astype(jnp.float32)
    return x


def apply_value_head(head: ValueHead, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows"]:
    """The value at every token, from hidden states after the final norm."""
    logits = value_logits(head, hidden)
    if head.histogram is not None:
        return read_out(logits, head.histogram)
    return squash_value(logits[..., 0], head.squash)


def squash_value(x: Array, squash: str) -> Array:
    """Bounds raw values as `HeadConfig.squash` says."""
    if squash == "tanh":
        return jnp.tanh(x)
    if squash == "sigmoid":
        return jax.nn.sigmoid(x)
    return 2 * jax.nn.sigmoid(x) - 1 if squash == "signed_sigmoid" else x


def save_value_head(folder: str | os.PathLike[str], head: ValueHead) -> Path:
    """Writes value_head.safetensors into an existing folder, in float32."""
    arrays = {}
    for i, layer in enumerate(head.layers):
        arrays[f"layers.{i}.weight"] = np.asarray(layer.weight)
        arrays[f"layers.{i}.bias"] = np.asarray(layer.bias)
    metadata = {"squash": head.squash}
    if head.histogram is not None:
        metadata["histogram"] = json.dumps(dataclasses.asdict(head.histogram))
    shapes = [(name, array.shape) for name, array in arrays.items()]
    path = Path(folder) / VALUE_HEAD
    scratch = path.with_name(f".{VALUE_HEAD}.{os.getpid()}.part")
    try:
        write_tensors(scratch, shapes, arrays.__getitem__, "float32", metadata)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def load_value_head(folder: str | os.PathLike[str], model_dim: int) -> ValueHead:
    """Reads value_head.safetensors of a folder: tensors layers.{i}.weight and .bias.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it does not fit a model of width `model_dim`, or is damaged.
    """
    file = TensorFile(Path(folder) / VALUE_HEAD)
    try:
        specs = _described_as(file, model_dim)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    layers = []
    for i in range(len(specs.layers)):
        weight, bias = (file.read(f"layers.{i}.{part}") for part in ("weight", "bias"))
        layers.append(Dense(jnp.array(weight, jnp.float32), jnp.array(bias, jnp.float32)))
    return ValueHead(tuple(layers), specs.squash, specs.histogram)


def _described_as(file: TensorFile, model_dim: int) -> ValueHead:
    """The description of the head in a file; ValueError when its tensors are not one."""
    num_layers = len(file.shapes) // 2
    names = {f"layers.{i}.{part}" for i in range(num_layers) for part in ("weight", "bias")}
    if not num_layers or set(file.shapes) != names:
        found = ", ".join(sorted(file.shapes)[:4])
        raise ValueError(f"expected layers.0.weight, layers.0.bias and so on, got {found}")
    hidden = tuple(math.prod(file.shapes[f"layers.{i}.bias"]) for i in range(num_layers - 1))
    histogram = _read_histogram(file.metadata.get("histogram"))
    cfg = HeadConfig(hidden, file.metadata.get("squash", "none"), histogram)
    specs = describe_value_head(model_dim, cfg)
    for i, layer in enumerate(specs.layers):
        for part, spec in (("weight", layer.weight), ("bias", layer.bias)):
            found = file.shapes[f"layers.{i}.{part}"]
            if found != spec.shape:
                raise ValueError(
                    f"layers.{i}.{part} is {list(found)}, expected {list(spec.shape)} "
                    f"for a model of width {model_dim}"
                )
    return specs


def _read_histogram(text: str | None) -> Histogram | None:
    """A histogram out of a file's metadata, None where there is none."""
    if text is None:
        return None
    try:
        fields = json.loads(text)
        numbers = {name: fields[name] for name in ("low", "high", "num_bins", "sigma_bins")}
        return Histogram(**numbers)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"histogram {text[:80]!r}: {error}") from None
