"""What several tests of this room grow and search."""

import jax.numpy as jnp
import pytest
from scripted import grow
from tiny_language import make_model

from rlm_jax.reasoning.structure import make_structure


@pytest.fixture(scope="session")
def model():
    """A tiny language model and its config."""
    return make_model()


@pytest.fixture(scope="session")
def tree():
    """root -> 1, 2; 1 -> 3, 4 (both terminal); 2 -> 5 (terminal), 6 (not)."""
    structure = make_structure(jnp.asarray([3]), 10)
    structure, _ = grow(structure, [0], 2, [0.5, 0.6])
    structure, _ = grow(
        structure, [1, 2], 2, [0.2, 0.3, 0.6, 0.9], terminal=[True, True, True, False]
    )
    return structure
