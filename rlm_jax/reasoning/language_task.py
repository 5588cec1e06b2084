"""What a self-verifying task says of new steps, and what follows from it for a search.

The one idea: a step that the task has decided on needs no judge. A step that does not follow, and
a solution that ends without being right, are refuted: terminal, worth `dead_value`, and without an
answer, so that they vote for nothing. A step that solves the problem is terminal, proven and worth
1. Without a task nothing is decided, and `Verdicts` says so; whoever reads it need not ask.

A state's key goes to steps from which the search can go on, alone. An ended step may leave the
state of its parent behind ("the answer is 8"), or that of a sibling which goes on: merged with it,
one of the two would be lost.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32, PyTree, UInt32
from rlm_jax.tasks.device import DeviceTask


@struct
class Verdicts:
    """What is known of R new steps.

    state: the task's states behind them; None without a task. illegal: the step does not follow.
    solved: it ends a right solution. terminal: nothing goes on from it. state_key: of the state
    behind it, 0 where nothing goes on. num_checks: 1 where the task was asked.
    """

    state: PyTree
    illegal: Bool[Array, "R"]
    solved: Bool[Array, "R"]
    terminal: Bool[Array, "R"]
    state_key: UInt32[Array, "R"]
    num_checks: Int32[Array, "R"]

    @property
    def decided(self) -> Bool[Array, "R"]:
        """Steps that no evaluator need judge."""
        return self.terminal & (self.num_checks > 0)

    def values(self, judged: Float32[Array, "R"], dead_value: float) -> Float32[Array, "R"]:
        """The evaluator's values, and the task's where it has decided."""
        return decided_values(judged, self.decided, self.solved, dead_value)


def decided_values(
    judged: Float32[Array, "*R"],
    decided: Bool[Array, "*R"],
    solved: Bool[Array, "*R"],
    dead_value: float,
) -> Float32[Array, "*R"]:
    """1 for what is solved, `dead_value` for what is refuted, the judged value for the rest."""
    return jnp.where(decided, jnp.where(solved, 1.0, dead_value), judged)


def check_steps(
    task: DeviceTask | None,
    tables: PyTree,
    states: PyTree,
    tokens: Int32[Array, "R S"],
    length: Int32[Array, "R"],
    ends: Bool[Array, "R"],
    *,
    may_return: bool = True,
    may_err: bool = False,
) -> Verdicts:
    """Asks the task about R steps; steps without a token are not looked at.

    Args:
      states: of what the steps follow, leaves [R, ...]. ends: the step ends its solution.
      may_return: whether steps are legal that take earlier ones back, or make that necessary.
      may_err: whether steps are legal that do not follow, but say what they leave.
    """
    made = length > 0
    if task is None:
        none = ends & False
        nothing = length * 0
        return Verdicts(None, none, none, ends, nothing.astype(jnp.uint32), nothing)
    checked = jax.vmap(task.step, (None, 0, 0, 0, 0))(tables, states, tokens, length, ends)
    told = made & checked.known
    legal = checked.legal if may_return else checked.legal & ~checked.chain_only
    if may_err:
        legal |= checked.claims
    illegal = told & ~legal
    solved = told & legal & checked.solved
    terminal = made & (ends | illegal | solved)
    return Verdicts(
        state=checked.state,
        illegal=illegal,
        solved=solved,
        terminal=terminal,
        state_key=jnp.where(made & ~terminal, checked.key, 0).astype(jnp.uint32),
        num_checks=told.astype(jnp.int32),
    )


def begin_states(
    task: DeviceTask | None,
    tables: PyTree,
    prompts: Int32[Array, "F T"],
    lengths: Int32[Array, "F"],
) -> PyTree:
    """The task's states of F problems, leaves [F, ...]; None without a task."""
    if task is None:
        return None
    return jax.vmap(task.begin, (None, 0, 0))(tables, prompts, lengths)


def begin_keys(
    task: DeviceTask | None, states: PyTree, like: Int32[Array, "F"]
) -> UInt32[Array, "F"]:
    """Keys of the states that F problems begin in; 0 where the task names none."""
    if task is None or task.key is None:
        return (like * 0).astype(jnp.uint32)
    return jax.vmap(task.key)(states)


def count_outcomes(task: DeviceTask | None, states: PyTree) -> int:
    """M, the steps from one state that the task has places for.

    Args:
      states: leaves [B, N, ...].
    """
    assert task is not None
    assert task.outcomes is not None
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), states)
    return jax.eval_shape(task.outcomes, state).goal.shape[0]


def empty_states(
    task: DeviceTask | None, tables: PyTree, width: int, like: Int32[Array, "B N"]
) -> PyTree:
    """Room for a state per node, leaves [B, N, ...] derived from `like`; None without a task.

    Args:
      width: tokens of a padded prompt.
    """
    if task is None:
        return None
    prompt = jax.ShapeDtypeStruct((width,), jnp.int32)
    state = jax.eval_shape(task.begin, tables, prompt, jax.ShapeDtypeStruct((), jnp.int32))

    def room(leaf: jax.ShapeDtypeStruct) -> Array:
        zero = (like * 0).reshape(*like.shape, *(1 for _ in leaf.shape)).astype(leaf.dtype)
        return jnp.broadcast_to(zero, (*like.shape, *leaf.shape))

    return jax.tree.map(room, state)
