"""Value heads: from hidden states to one number per token, as pure functions of parameters.

A head is a stack of dense layers with ReLU between them and a squashing function at the end, or a
histogram whose mean is the value (`histogram.py`). No hidden layer gives the plain linear head;
hidden widths (1024, 256) with 2 sigmoid(x) - 1 give the head of x1, the reference implementation of
"Reasoning Language Models: A Blueprint" (arXiv 2501.11223, app. C). A head may judge a state for
many goals at once (`GoalFactors`). Everything is float32 whatever the dtype of the hidden states: a
bfloat16 head moves the values that a search compares.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Array, Float, Float32, Key
from rlm_jax.models.histogram import Histogram, read_out
from rlm_jax.models.number_embedding import NUM_WAVES, number_waves
from rlm_jax.models.params import ParamSpec, init_specs, name_leaves, normal_init, zeros_init
from rlm_jax.models.tensor_file import TensorFile, write_tree
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
class GoalFactors:
    """A value for each of G goals as a product of two factors of width r: one of the state, one of
    the goal (universal value functions, Schaul et al. 2015, section 3.1: two streams, factored).

    Goals are the numbers 0 to G - 1, and a goal's factor is made of what the number is, so that
    goals which no training saw have one too. A solver knows all that can be made of a state, and
    one forward learns G values instead of one. Beside a value head it is for training, as a search
    reads the head's layers; a network for states (`state_value.py`) is read through it.
    """

    state: Dense
    goal: Dense
    num_goals: int = static(0)


@struct
class ValueHead:
    """Dense layers of a value head, and its squashing function or its histogram.

    The last layer is of width 1, or has an output for each bin. goals: an auxiliary head beside it.
    """

    layers: tuple[Dense, ...]
    squash: str = static("none")
    histogram: Histogram | None = static(None)
    goals: GoalFactors | None = None


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of a value head: widths of its hidden layers, and what bounds its output.

    squash: "none"; "tanh" (-1, 1); "sigmoid" (0, 1); "signed_sigmoid" 2 sigmoid(x) - 1 (-1, 1).
    histogram: bins of a categorical head, which its own range bounds (squash "none").
    num_goals: goals of `GoalFactors`, 0 for a head without; goal_rank: the width of the factors.
    """

    hidden: tuple[int, ...] = ()
    squash: str = "tanh"
    histogram: Histogram | None = None
    num_goals: int = 0
    goal_rank: int = 64

    def __post_init__(self):
        if self.squash not in SQUASHES:
            raise ValueError(f"squash {self.squash!r}: accepted {SQUASHES}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be positive, got {self.hidden}")
        if self.histogram is not None and self.squash != "none":
            raise ValueError(f"squash {self.squash!r} with a histogram: accepted is 'none'")
        if self.num_goals < 0 or self.goal_rank < 1:
            raise ValueError(
                f"num_goals={self.num_goals}, goal_rank={self.goal_rank}: accepted are >= 0, >= 1"
            )

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
    goals = describe_goals(model_dim, cfg, dtype) if cfg.num_goals else None
    return ValueHead(tuple(layers), cfg.squash, cfg.histogram, goals)


def describe_goals(model_dim: int, cfg: HeadConfig, dtype: Any = jnp.float32) -> GoalFactors:
    """The description of the factors: `GoalFactors` whose leaves are `ParamSpec`."""
    rank = cfg.goal_rank

    def dense(columns: int, axis: str | None, gain: float = 1.0) -> Dense:
        init = normal_init(gain * columns**-0.5)
        weight: Any = ParamSpec((rank, columns), dtype, (None, axis), init)
        bias: Any = ParamSpec((rank,), dtype, (None,), zeros_init)
        return Dense(weight, bias)

    return GoalFactors(
        state=dense(model_dim, "embed", 2.0),
        goal=dense(NUM_WAVES, None, 0.3),
        num_goals=cfg.num_goals,
    )


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
        x = apply_dense(layer, jax.nn.relu(x) if i else x)
    return x


@jax.named_scope("goal_logits")
def goal_logits(goals: GoalFactors, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows G"]:
    """The logit of success for each goal at every token."""
    state = apply_dense(goals.state, hidden.astype(jnp.float32))
    goal = apply_dense(goals.goal, number_waves(jnp.arange(goals.num_goals)))
    return linear(state, goal) / math.sqrt(state.shape[-1])


def apply_dense(layer: Dense, x: Float32[Array, "*rows in_"]) -> Float32[Array, "*rows out"]:
    """One layer, in float32."""
    return linear(x, layer.weight.astype(jnp.float32)) + layer.bias.astype(jnp.float32)


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
    metadata = {"squash": head.squash}
    if head.goals is not None:
        metadata["num_goals"] = str(head.goals.num_goals)
    if head.histogram is not None:
        metadata["histogram"] = json.dumps(dataclasses.asdict(head.histogram))
    path = Path(folder) / VALUE_HEAD
    write_tree(path, head, "float32", metadata)
    return path


def load_value_head(folder: str | os.PathLike[str], model_dim: int) -> ValueHead:
    """Reads value_head.safetensors of a folder: tensors layers.{i}.weight and .bias, and of a head
    for many goals goals.state and goals.goal, .weight and .bias.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it does not fit a model of width `model_dim`, or is damaged.
    """
    file = TensorFile(Path(folder) / VALUE_HEAD)
    try:
        specs = _described_as(file, model_dim)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    arrays = [jnp.array(file.read(name), jnp.float32) for name in name_leaves(specs)]
    return jax.tree.unflatten(jax.tree.structure(specs), arrays)


def _described_as(file: TensorFile, model_dim: int) -> ValueHead:
    """The description of the head in a file; ValueError when its tensors are not one."""
    num_layers = sum(name.startswith("layers.") for name in file.shapes) // 2
    hidden = tuple(
        math.prod(file.shapes.get(f"layers.{i}.bias", (1,))) for i in range(num_layers - 1)
    )
    rank = math.prod(file.shapes.get("goals.state.bias", (0,)))
    if not num_layers:
        found = ", ".join(sorted(file.shapes)[:4])
        raise ValueError(f"expected layers.0.weight, layers.0.bias and so on, got {found}")
    cfg = HeadConfig(
        hidden,
        file.metadata.get("squash", "none"),
        _read_histogram(file.metadata.get("histogram")),
        _read_count(file.metadata.get("num_goals", "1")) if rank else 0,
        max(rank, 1),
    )
    specs = describe_value_head(model_dim, cfg)
    wanted = {name: spec.shape for name, spec in name_leaves(specs).items()}
    if set(file.shapes) != set(wanted):
        found = ", ".join(sorted(set(file.shapes) ^ set(wanted))[:4])
        raise ValueError(f"expected {', '.join(wanted)}; missing, or too many: {found}")
    for name, shape in wanted.items():
        if file.shapes[name] != shape:
            raise ValueError(
                f"{name} is {list(file.shapes[name])}, expected {list(shape)} "
                f"for a model of width {model_dim}"
            )
    return specs


def _read_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 8):
        raise ValueError(f"num_goals {text[:80]!r} is no number of goals")
    return int(text)


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
