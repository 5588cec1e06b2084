"""Growing structures by hand: outcomes that a test writes down."""

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.operators.structure import child_slots, generate
from rlm_jax.reasoning.protocol import Outcome, Request
from rlm_jax.reasoning.structure import Operator, check

_DTYPES = {
    "duplicate": bool,
    "terminal": bool,
    "proven": bool,
    "valid": bool,
    "length": np.int32,
    "answer_key": np.uint32,
    "state_key": np.uint32,
}


def make_outcome(structure, request, node_value=0.0, **fields):
    """An outcome of these fields, each of B * W * K entries in order; the rest is dull."""
    shape = (*request.nodes.shape, request.num_children)
    taken = np.broadcast_to(np.asarray(request.grows)[..., None], shape)
    defaults = {"valid": True, "length": 1}
    names = ("valid", "duplicate", "length", "logprob", "value", "reward", "terminal")
    made = {}
    for name in (*names, "answer_key", "state_key", "proven"):
        values = np.asarray(fields.get(name, defaults.get(name, 0)))
        values = values.reshape(shape) if values.ndim else np.broadcast_to(values, shape)
        made[name] = values.astype(_DTYPES.get(name, np.float32))
    made["valid"] &= taken
    made["length"] *= taken
    cost = _make_cost(jnp.asarray(made["length"]))
    made = {name: jnp.asarray(values) for name, values in made.items()}
    return Outcome(**made, node_value=jnp.full(shape[:2], node_value, jnp.float32), cost=cost)


def make_request(nodes, num_children):
    """A request to grow these nodes of a batch of one."""
    nodes = jnp.asarray(np.asarray([nodes], np.int32))
    return Request(nodes, jnp.full(nodes.shape, Operator.GENERATE, jnp.int32), num_children)


@jax.jit
def _make_cost(length):
    tokens = length.sum((1, 2))
    return zero_budget(tokens).replace(generated_tokens=tokens)


_append = jax.jit(lambda s, r, o: generate(s, r, o, o.logprob * 0.0 + 1.0))


def grow(structure, nodes, num_children, values, **fields):
    """Appends children with these values under `nodes` of a batch of one."""
    request = make_request(nodes, num_children)
    outcome = make_outcome(structure, request, value=values, logprob=-np.asarray(values), **fields)
    structure, slots = _append(structure, request, outcome)
    check(structure)
    return structure, slots


def make_scripted_expand(script):
    """An expander of a batch of one that knows every node: script[name] -> [(name, value, end)].

    Its world is the list of names by slot.
    """

    def expand(params, keys, names, structure, request):
        del params, keys
        rows = [
            script[names[int(n)]] if n >= 0 else [("", 0.0, False)] * request.num_children
            for n in np.asarray(request.nodes[0])
        ]
        steps = [step for row in rows for step in row]
        outcome = make_outcome(
            structure,
            request,
            value=[value for _, value, _ in steps],
            terminal=[end for *_, end in steps],
        )
        slots = np.asarray(child_slots(structure, request)).ravel()
        for slot, (name, *_) in zip(slots, steps, strict=True):
            names = {**names, int(slot): name}
        return outcome, names

    return expand
