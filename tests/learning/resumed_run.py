"""A run to be killed: noise is added to a large array, every step is saved, and it goes on.

python resumed_run.py FOLDER NUM_STEPS
"""

import sys

import jax
import jax.numpy as jnp

from rlm_jax.learning.checkpoints import (
    open_checkpoints,
    read_extra,
    restore_checkpoint,
    save_checkpoint,
)

NUM_NUMBERS = 3_000_000


def start():
    """The state before the first step."""
    return {"weights": jnp.zeros(NUM_NUMBERS), "key": jax.random.key(7), "step": jnp.int32(0)}


def advance(state):
    """One step of the run; what it does depends on all of the state."""
    key, now = jax.random.split(state["key"])
    noise = jax.random.uniform(now, state["weights"].shape)
    weights = 0.9 * state["weights"] + noise * state["step"]
    return {"weights": weights, "key": key, "step": state["step"] + 1}


def run(folder, num_steps):
    """Goes on from the last step in the folder."""
    step_fn = jax.jit(advance, donate_argnums=0)
    with open_checkpoints(folder, keep_last=2) as checkpoints:
        state = start()
        if checkpoints.latest_step() is not None:
            state, extra = restore_checkpoint(checkpoints, state)
            assert extra == read_extra(checkpoints) == {"step": int(state["step"])}
        while int(state["step"]) < num_steps:
            state = step_fn(state)
            step = int(state["step"])
            save_checkpoint(checkpoints, step, state, {"step": step})


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
