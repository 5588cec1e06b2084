"""Settings that all tree searches share."""

import dataclasses

from rlm_jax.reasoning.operators.traversal import ANSWER_RULES, AnswerRule
from rlm_jax.reasoning.operators.update import BACKUPS, BackupRule
from rlm_jax.reasoning.protocol import JUDGEMENTS

TERMINAL_RULES = ("exclude", "revisit", "stop")
TIE_BREAKS = ("first", "random")


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """Settings that all tree searches share.

    num_children: K steps sampled per leaf. num_lanes: W leaves per structure and round.
    max_depth: steps from the problem to the deepest node. num_simulations: leaves to select after
      the root was grown; None leaves the end to budget and capacity.
    judge: when nodes are evaluated, "expansion" or "visit". backup, discount, learning_rate: see
      `backpropagate`.
    terminal: a terminal node, once judged, is left alone ("exclude": AlphaMath, rStar-Math), may be
      selected again to back its value up once more ("revisit"; needs num_simulations), or ends the
      search of its structure when it is selected ("stop": x1).
    resample: sample the root anew when nothing is left to grow.
    root_lanes: how many lanes of K children the root gets.
    merge_states: a child whose state the structure holds already is merged with it and not searched
      twice; the expander names states by `state_key`. Room for the edges: `num_parents` > 1.
    tie_break: among equal scores the step sampled "first" (rStar-Math), or a "random" one
      (ReST-MCTS*, AlphaMath).
    length_power, normalise_prior: see `step_prior`. root_noise, root_alpha: weight and
      concentration of Dirichlet noise on the root's prior (AlphaZero; TS-LLM: 0.25, 0.3).
    answer_rule: how the finished solutions vote, see `select_answer`.
    """

    num_children: int = 4
    num_lanes: int = 1
    max_depth: int = 16
    num_simulations: int | None = None
    judge: str = "expansion"
    backup: BackupRule = "mean"
    discount: float = 1.0
    learning_rate: float = 1.0
    terminal: str = "exclude"
    resample: bool = True
    root_lanes: int = 1
    merge_states: bool = False
    tie_break: str = "first"
    length_power: float = 1.0
    normalise_prior: bool = True
    root_noise: float = 0.0
    root_alpha: float = 0.3
    answer_rule: AnswerRule = "weighted"

    def __post_init__(self):
        for name in ("num_children", "num_lanes", "max_depth", "root_lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        choices = {
            "judge": JUDGEMENTS,
            "backup": BACKUPS,
            "terminal": TERMINAL_RULES,
            "tie_break": TIE_BREAKS,
            "answer_rule": ANSWER_RULES,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} {getattr(self, name)!r}: accepted are {accepted}")
        for name in ("discount", "learning_rate", "root_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.root_alpha <= 0:
            raise ValueError(f"root_alpha must be > 0, got {self.root_alpha}")
        if self.root_lanes > self.num_lanes:
            asked, most = self.root_lanes, self.num_lanes
            raise ValueError(f"root_lanes={asked} of num_lanes={most}: accepted is at most that")
        if self.num_simulations is not None and self.num_simulations < 1:
            raise ValueError(f"num_simulations must be >= 1 or None, got {self.num_simulations}")
        if self.terminal == "revisit" and self.num_simulations is None:
            raise ValueError("terminal 'revisit' needs num_simulations, or it never ends")

    @property
    def num_root_children(self) -> int:
        """Children that the root is given at once."""
        return self.root_lanes * self.num_children
