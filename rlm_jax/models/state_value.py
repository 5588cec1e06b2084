"""A value network of its own that reads what is left to do, and nothing of how it came to that.

A value head sits on the policy's hidden states, which know the whole path; but where a task says
what its state is, two paths to one state are worth the same. Here a small transformer reads the
state as a set of whole numbers (no positions, every item sees every other), and one forward judges
it for all goals that a problem may have at once, as a product of a factor of the state and one of
the goal (`heads.GoalFactors`; universal value functions, Schaul et al. 2015). The goal itself is
not shown to the trunk: what is asked about one goal was in the way of what is learned of all of
them (docs/log.md, 2026-11-28).

It is the value model V(s) of Blueprint, arXiv 2501.11223, appendix A.1.1, with its own parameters
as there. Deviation: there s is the whole chain so far, here it is what the task says is left of it.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Array, Float32, Int32, Key
from rlm_jax.models.attention import make_set_attend
from rlm_jax.models.checkpoint import cast, float_dtype
from rlm_jax.models.config import ModelConfig, check_count
from rlm_jax.models.heads import GoalFactors, HeadConfig, describe_goals, goal_logits
from rlm_jax.models.number_embedding import init_number_embeddings
from rlm_jax.models.params import Params, describe, init_specs, name_leaves
from rlm_jax.models.tensor_file import TensorFile, write_tree
from rlm_jax.models.transformer import forward

STATE_VALUE = "state_value.safetensors"
_CONFIG = "config"


@dataclasses.dataclass(frozen=True)
class StateValueConfig:
    """Shape of a state value network.

    num_goals: goals 0 to num_goals - 1 have a value. num_numbers: numbers below it have a row of
    their own in the embedding; larger ones share one.
    """

    num_goals: int
    num_layers: int = 4
    model_dim: int = 128
    num_heads: int = 4
    ffn_dim: int = 320
    num_numbers: int = 2048
    goal_rank: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_count(field.name, getattr(self, field.name))
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(
                f"model_dim={self.model_dim}: accepted are multiples of {2 * self.num_heads}, "
                f"an even width for each of num_heads={self.num_heads}"
            )

    @property
    def trunk(self) -> ModelConfig:
        """The transformer. Behind the numbers stand what is larger, and what reads the others."""
        return ModelConfig(
            vocab_size=self.num_numbers + 2,
            num_layers=self.num_layers,
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.model_dim // self.num_heads,
            ffn_dim=self.ffn_dim,
            qk_norm=True,
            tie_embeddings=True,
        )


@struct
class StateValue:
    """A state value network: its parameters, and its shape."""

    trunk: Params
    goals: GoalFactors
    cfg: StateValueConfig = static()


def describe_state_value(cfg: StateValueConfig, dtype: Any = jnp.float32) -> StateValue:
    """The network's description: a `StateValue` whose leaves are `ParamSpec`."""
    head = HeadConfig(num_goals=cfg.num_goals, goal_rank=cfg.goal_rank)
    goals = describe_goals(cfg.model_dim, head)
    return StateValue(describe(cfg.trunk, dtype), goals, cfg)


def init_state_value(key: Key[Array, ""], cfg: StateValueConfig) -> StateValue:
    """Draws a network in float32; the embeddings of numbers begin with what the numbers are."""
    network = init_specs(key, describe_state_value(cfg))
    numbers = [*range(cfg.num_numbers), -1, -1]
    embed = init_number_embeddings(jax.random.fold_in(key, 1), network.trunk.embed, numbers)
    return dataclasses.replace(network, trunk=dataclasses.replace(network.trunk, embed=embed))


def widen_numbers(network: StateValue, num_numbers: int) -> StateValue:
    """The same network with rows of their own for more numbers, which begin as the one they shared.

    So it says of every state what it said before, until it learns on.

    Raises:
      ValueError: it has more rows already.
    """
    more = num_numbers - network.cfg.num_numbers
    if more < 0:
        raise ValueError(
            f"num_numbers={num_numbers}: the network has {network.cfg.num_numbers} already"
        )
    embed = network.trunk.embed
    rows = jnp.concatenate([embed[:-2], jnp.repeat(embed[-2:-1], more, axis=0), embed[-2:]])
    cfg = dataclasses.replace(network.cfg, num_numbers=num_numbers)
    return StateValue(dataclasses.replace(network.trunk, embed=rows), network.goals, cfg)


@jax.named_scope("state_value")
def state_goal_logits(network: StateValue, items: Int32[Array, "R M"]) -> Float32[Array, "R G"]:
    """The logit of success for each goal, of R states.

    Args:
      items: the numbers of each state, in any order; negative where there are fewer than M.
    """
    cfg = network.cfg
    reader = jnp.full_like(items[:, :1], cfg.num_numbers + 1)
    tokens = jnp.concatenate([jnp.clip(items, 0, cfg.num_numbers), reader], axis=1)
    present = jnp.concatenate([items >= 0, reader >= 0], axis=1)
    hidden, _ = forward(
        network.trunk,
        tokens,
        jnp.zeros_like(tokens),
        cfg=cfg.trunk,
        attend=make_set_attend(cfg.trunk, present),
    )
    return goal_logits(network.goals, hidden[:, -1])


def apply_state_value(
    network: StateValue, items: Int32[Array, "R M"], goals: Int32[Array, "R"]
) -> Float32[Array, "R"]:
    """The chance of success, of R states with a goal each; 0 for a goal that has no value."""
    logits = state_goal_logits(network, items)
    known = (goals >= 0) & (goals < network.cfg.num_goals)
    at = jnp.clip(goals, 0, network.cfg.num_goals - 1)
    chance = jax.nn.sigmoid(jnp.take_along_axis(logits, at[:, None], axis=1)[:, 0])
    return jnp.where(known, chance, 0.0)


def save_state_value(
    folder: str | os.PathLike[str], network: StateValue, dtype: Any = jnp.float32
) -> Path:
    """Writes state_value.safetensors into an existing folder."""
    path = Path(folder) / STATE_VALUE
    write_tree(path, network, dtype, {_CONFIG: json.dumps(dataclasses.asdict(network.cfg))})
    return path


def load_state_value(folder: str | os.PathLike[str], dtype: Any = jnp.float32) -> StateValue:
    """Reads state_value.safetensors of a folder; the goals' factors are float32 whatever `dtype`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or its tensors are not those of its config.
    """
    file = TensorFile(Path(folder) / STATE_VALUE)
    specs = describe_state_value(_read_config(file), float_dtype(dtype))
    wanted = name_leaves(specs)
    if set(file.shapes) != set(wanted):
        found = ", ".join(sorted(set(file.shapes) ^ set(wanted))[:4])
        raise ValueError(f"{file.path}: missing, or too many: {found}")
    for name, spec in wanted.items():
        if file.shapes[name] != spec.shape:
            raise ValueError(
                f"{file.path}: {name} is {list(file.shapes[name])}, expected {list(spec.shape)}"
            )
    arrays = [jnp.array(cast(file.read(name), spec.dtype)) for name, spec in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(specs), arrays)


def _read_config(file: TensorFile) -> StateValueConfig:
    text = file.metadata.get(_CONFIG, "")
    try:
        fields = json.loads(text)
        names = [field.name for field in dataclasses.fields(StateValueConfig)]
        return StateValueConfig(**{name: fields[name] for name in names})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file.path}: config {text[:80]!r}: {error}") from None
