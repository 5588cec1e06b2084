"""Runs a program of experiments/ inside this process, as its command line would be.

A process of its own costs seconds of imports a run; here only what the program itself does is paid
for. Its flags are defined anew each time and forgotten again, and what it changes of JAX's and
absl's settings is put back.
"""

import contextlib
import importlib.util
import io
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
from absl import app, flags
from absl import logging as absl_logging
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class Done(NamedTuple):
    """What a run left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def run_program(name: str, *args: str, cache: pathlib.Path | None = None) -> Done:
    """Runs experiments/NAME with `args`; its compiled programs go to the folder `cache`."""
    path = ROOT / "experiments" / name
    out, err = io.StringIO(), io.StringIO()
    argv = [str(path), *args, f"--compilation_cache={cache or ''}"]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.dict("os.environ", COLUMNS="100"),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _own_settings(),
        warnings.catch_warnings(),
    ):
        # How ml_collections loads a config file.
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
        # Both define flags when first used and never again: before the flags are saved.
        import launching

        app.define_help_flags()
        with flagsaver.flagsaver():
            status = launching.run(_load_main(path))
            flags.FLAGS.unparse_flags()
    return Done(status, out.getvalue(), err.getvalue())


def _load_main(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # absl asks there which module defines a flag.
    spec.loader.exec_module(module)
    return module.main


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    handlers, level = logging.root.handlers[:], logging.getLogger("jax").level
    verbosity = absl_logging.get_verbosity()
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        logging.root.handlers[:] = handlers
        logging.getLogger("jax").setLevel(level)
        absl_logging.set_verbosity(verbosity)
