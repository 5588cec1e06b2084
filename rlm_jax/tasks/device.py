"""What a self-verifying task offers a search inside the compiled program: steps checked on ids.

A `DeviceTask` reads a problem once from its prompt's token ids, and then every step from the state
before it. The one idea: what may be said about a step without a gold answer (it does not follow,
it solves the problem, it leads where another step led) is known the moment the step is decoded,
on the device, so a search spends nothing on dead ends and can stop at a proven solution.

Both functions are for one row; callers vmap them. `tables` holds what a vocabulary's tokens mean,
as arrays, so that tokenizers change without a compile.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlm_jax.core.types import Array, Bool, Int32, PyTree, UInt32


class StepCheck(NamedTuple):
    """What is known about one step.

    Attributes:
      state: the task's state behind the step; meaningless unless `legal` or `claims`.
      legal: the step follows from the state before it. A task that cannot tell says True.
      solved: the step ends a solution that is right.
      key: hash of the state behind the step, equal for equal states; 0 where there is none.
      known: the task could read the problem; otherwise it decides nothing about its steps.
      chain_only: the step takes earlier ones back, or nothing but that can follow it. A chain may
        go on from it; a tree goes back by itself.
      claims: the step does not follow, but says what it leaves; `state` is that, and nothing that
        stands on it solves the problem.
    """

    state: PyTree
    legal: Bool[Array, ""]
    solved: Bool[Array, ""]
    key: UInt32[Array, ""]
    known: Any = np.True_
    chain_only: Any = np.False_
    claims: Any = np.False_


class Observation(NamedTuple):
    """What a network that judges states is shown of one (`models.state_value`).

    Attributes:
      items: the numbers that make up the state, in any order, negative where there are fewer.
      goal: what is to be reached from it; negative where the task could not read the problem.
    """

    items: Int32[Array, "M"]
    goal: Int32[Array, ""]


class MoveList(NamedTuple):
    """How a task spells the legal steps from a state, for decoders that are held to them.

    Attributes:
      spell: (tables, state, S) -> the tokens [M, S] of each, without what ends a step, and their
        lengths [M]: 0 where there is none, or none that leaves room in S for what ends it.
      ends: tables -> the tokens [V] that may stand behind it.
      fits: tables -> whether the vocabulary has what `spell` writes with.
    """

    spell: Callable[[PyTree, PyTree, int], tuple[Int32[Array, "M S"], Int32[Array, "M"]]]
    ends: Callable[[PyTree], Bool[Array, "V"]]
    fits: Callable[[PyTree], Bool[Array, ""]]


class DeviceTask(NamedTuple):
    """A task's checker on token ids.

    Attributes:
      make_tables: bytes of every token of a vocabulary -> tables (a pytree of arrays).
      begin: (tables, prompt ids [T], length) -> state. Padding lies behind `length`.
      step: (tables, state, step ids [S], length, ends) -> what is known; `ends` says that the
        step ends the solution.
      key: state -> its hash, as `StepCheck.key` has it; None for a task that names no states.
      returns: tables -> the tokens [V] that only a step begins with which takes earlier ones back
        (`StepCheck.chain_only`); None for a task that has no such steps.
      observe: state -> what it is, in numbers; None for a task that does not say.
      marks: tables -> the tokens [V] behind which a prompt, or a step, spells its state to its end;
        None where steps do not say what they leave.
      left: state -> `key` of the states [K] that a step may go back to, 0 where there is none.
      moves: how it lists all legal steps; None for a task that does not.
      outcomes: state -> what `observe` says behind each of M legal steps, in the order of `moves`,
        items [M, ...] and goals [M]; no items where there is no step, or the task decides itself
        what lies behind it. The same for states of one key. None for a task that does not say.
    """

    make_tables: Callable[[Sequence[bytes]], PyTree]
    begin: Callable[[PyTree, Int32[Array, "T"], Int32[Array, ""]], PyTree]
    step: Callable[
        [PyTree, PyTree, Int32[Array, "S"], Int32[Array, ""], Bool[Array, ""]], StepCheck
    ]
    key: Callable[[PyTree], UInt32[Array, ""]] | None = None
    returns: Callable[[PyTree], Bool[Array, "V"]] | None = None
    observe: Callable[[PyTree], Observation] | None = None
    marks: Callable[[PyTree], Bool[Array, "V"]] | None = None
    left: Callable[[PyTree], UInt32[Array, "K"]] | None = None
    moves: MoveList | None = None
    outcomes: Callable[[PyTree], Observation] | None = None
