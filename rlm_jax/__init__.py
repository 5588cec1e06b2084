"""rlm_jax: build, train and search reasoning language models in JAX."""

__version__ = "0.1.0"
