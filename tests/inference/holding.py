"""Steps by random logits, for what holds them to texts."""

import jax.numpy as jnp
import numpy as np


def write_steps(hold, follow, held, seed, num_vocab, end, num_tokens=5):
    """A step of each row, up to its token `end`, as `hold` lets it be and `follow` is told."""
    rng = np.random.default_rng(seed)
    written = []
    for index in range(num_tokens):
        logits = jnp.asarray(rng.normal(size=(held.length.shape[0], num_vocab)), jnp.float32)
        noise = rng.gumbel(size=logits.shape)
        token = np.argmax(np.asarray(hold(logits, held, index)) + noise, -1)
        written.append(token)
        held = follow(held, index, jnp.asarray(token, jnp.int32))
    rows = np.stack(written, 1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
