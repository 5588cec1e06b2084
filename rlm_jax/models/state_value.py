"""A value network of its own that reads what is left to do, and nothing of how it came to that.

A value head sits on the policy's hidden states, which know the whole path; but where a task says
what its state is, two paths to one state are worth the same. Here a small transformer reads the
state as a set of whole numbers (no positions, every item sees every other). Two readouts:

  factors  one forward judges a state for all goals that a problem may have at once, as a product of
           a factor of the state and one of the goal (`heads.GoalFactors`; universal value
           functions, Schaul et al. 2015). It learns fast, but what it says of a goal that no
           training saw is a guess between goals beside it.
  asked    a goal is one more number of the set, in the role of a question: it sees the others, and
           none of them sees it, so that what is learned of a state serves all goals (what is asked
           about one goal was in the way of that: docs/log.md, 2026-11-28). A number that was never
           a goal was among the items often enough, so goals that no training saw are judged nearly
           as well as others. Learned from the start it is slow: it takes over from the factors.

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
from rlm_jax.models.heads import (
    Dense,
    GoalFactors,
    HeadConfig,
    apply_dense,
    describe_goals,
    describe_value_head,
    goal_logits,
)
from rlm_jax.models.number_embedding import init_number_embeddings
from rlm_jax.models.params import Params, describe, init_specs, name_leaves
from rlm_jax.models.tensor_file import TensorFile, write_tree
from rlm_jax.models.transformer import forward, forward_embedded

STATE_VALUE = "state_value.safetensors"
READOUTS = ("factors", "asked")
_CONFIG = "config"


@dataclasses.dataclass(frozen=True)
class StateValueConfig:
    """Shape of a state value network.

    num_goals: goals 0 to num_goals - 1 have a value. num_numbers: numbers below it have a row of
    their own in the embedding; larger ones share one. goal_rank: of the factors.
    readout: how goals are judged, see above.
    """

    num_goals: int
    num_layers: int = 4
    model_dim: int = 128
    num_heads: int = 4
    ffn_dim: int = 320
    num_numbers: int = 2048
    goal_rank: int = 64
    readout: str = "factors"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "readout":
                check_count(field.name, getattr(self, field.name))
        if self.readout not in READOUTS:
            raise ValueError(f"readout {self.readout!r}: accepted {READOUTS}")
        if self.readout == "asked" and self.num_goals > self.num_numbers:
            raise ValueError(
                f"num_goals={self.num_goals}: accepted with readout 'asked' is at most "
                f"num_numbers={self.num_numbers}, as a goal is one of the numbers"
            )
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
    """A state value network: its parameters, and its shape. goals: what `cfg.readout` reads by."""

    trunk: Params
    goals: GoalFactors | Dense
    cfg: StateValueConfig = static()


def describe_state_value(cfg: StateValueConfig, dtype: Any = jnp.float32) -> StateValue:
    """The network's description: a `StateValue` whose leaves are `ParamSpec`."""
    if cfg.readout == "factors":
        head = HeadConfig(num_goals=cfg.num_goals, goal_rank=cfg.goal_rank)
        goals: GoalFactors | Dense = describe_goals(cfg.model_dim, head)
    else:
        (goals,) = describe_value_head(cfg.model_dim, HeadConfig()).layers
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


def begin_asking(network: StateValue) -> StateValue:
    """A network that reads by factors as one that is asked: its trunk, and a readout that knows
    nothing yet. One that is asked already is returned as it is."""
    cfg = dataclasses.replace(network.cfg, readout="asked")
    if cfg == network.cfg:
        return network
    goals = jax.tree.map(lambda spec: jnp.zeros(spec.shape), describe_state_value(cfg).goals)
    return StateValue(network.trunk, goals, cfg)


@jax.named_scope("state_value")
def state_goal_logits(network: StateValue, items: Int32[Array, "R M"]) -> Float32[Array, "R G"]:
    """The logit of success for each goal, of R states.

    Args:
      items: the numbers of each state, in any order; negative where there are fewer than M.
    """
    cfg = network.cfg
    if isinstance(network.goals, Dense):
        goals = jnp.broadcast_to(jnp.arange(cfg.num_goals), (items.shape[0], cfg.num_goals))
        return asked_goal_logits(network, items, goals)
    reader = jnp.full_like(items[:, :1], cfg.num_numbers + 1)
    tokens = jnp.concatenate([jnp.clip(items, 0, cfg.num_numbers), reader], axis=1)
    present = jnp.concatenate([items >= 0, reader >= 0], axis=1)
    hidden, _ = forward(
        network.trunk,
        tokens,
        jnp.zeros_like(tokens),
        cfg=cfg.trunk,
        attend=make_set_attend(cfg.trunk, present, jnp.zeros(tokens.shape[1], bool)),
    )
    return goal_logits(network.goals, hidden[:, -1])


@jax.named_scope("state_value")
def asked_goal_logits(
    network: StateValue, items: Int32[Array, "R M"], goals: Int32[Array, "R K"]
) -> Float32[Array, "R K"]:
    """The logit of success for K goals of each of R states; goals are 0 to num_goals - 1."""
    cfg = network.cfg
    if isinstance(network.goals, GoalFactors):
        return jnp.take_along_axis(state_goal_logits(network, items), goals, axis=1)
    embed = network.trunk.embed
    # A number that is a goal: the number, and the row of what reads the others. Numbers' rows learn
    # from items alone, so that those that are never asked about in training are as the others.
    asked = jax.lax.stop_gradient(embed)[goals] + embed[cfg.num_numbers + 1]
    x = jnp.concatenate([embed[jnp.clip(items, 0, cfg.num_numbers)], asked], axis=1)
    present = jnp.concatenate([items >= 0, goals >= 0], axis=1)
    asks = jnp.arange(x.shape[1]) >= items.shape[1]
    hidden, _ = forward_embedded(
        network.trunk,
        x,
        jnp.zeros(x.shape[:2], jnp.int32),
        cfg=cfg.trunk,
        attend=make_set_attend(cfg.trunk, present, asks),
    )
    return apply_dense(network.goals, hidden[:, items.shape[1] :].astype(jnp.float32))[..., 0]


def apply_state_value(
    network: StateValue, items: Int32[Array, "R M"], goals: Int32[Array, "R"]
) -> Float32[Array, "R"]:
    """The chance of success, of R states with a goal each; 0 for a goal that has no value."""
    known = (goals >= 0) & (goals < network.cfg.num_goals)
    at = jnp.clip(goals, 0, network.cfg.num_goals - 1)
    chance = jax.nn.sigmoid(asked_goal_logits(network, items, at[:, None])[:, 0])
    return jnp.where(known, chance, 0.0)


def save_state_value(
    folder: str | os.PathLike[str], network: StateValue, dtype: Any = jnp.float32
) -> Path:
    """Writes state_value.safetensors into an existing folder."""
    path = Path(folder) / STATE_VALUE
    write_tree(path, network, dtype, {_CONFIG: json.dumps(dataclasses.asdict(network.cfg))})
    return path


def load_state_value(folder: str | os.PathLike[str], dtype: Any = jnp.float32) -> StateValue:
    """Reads state_value.safetensors of a folder; its readout is float32 whatever `dtype`.

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
        fields = {"readout": READOUTS[0]} | fields  # Older files have no other.
        names = [field.name for field in dataclasses.fields(StateValueConfig)]
        return StateValueConfig(**{name: fields[name] for name in names})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file.path}: config {text[:80]!r}: {error}") from None
