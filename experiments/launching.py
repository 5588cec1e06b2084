"""What every program of this folder does around its work: flags, errors, Ctrl-C, compiled programs.

A program is a function without arguments, run by `launch`. A user's mistake (a wrong flag, a
missing file, a value that is not accepted) is one line on stderr and exit status 2, an
interruption is status 130, and a bug keeps its traceback.
"""

import ctypes
import hashlib
import importlib.util
import itertools
import logging
import os
import pathlib
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from rlm_jax.core.mesh import AXES, make_mesh

_CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/rlm_jax/xla", "Folder of compiled programs; empty for none."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error comes from.")

MISTAKE, INTERRUPTED = 2, 130
# Names of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def launch(program: Callable[[], None], stopped: str = "stopped") -> NoReturn:
    """Runs a program as the whole process and exits with its status."""
    _keep_memory()
    status = run(program, stopped)
    if status == INTERRUPTED:
        # What still runs on the device would hold up an ordinary exit.
        os._exit(status)
    sys.exit(status)


def run(program: Callable[[], None], stopped: str = "stopped") -> int:
    """Parses sys.argv, runs a program and returns its exit status.

    Args:
      stopped: what to say once Ctrl-C or SIGTERM has ended it.
    """
    name = pathlib.Path(sys.argv[0]).name
    logging.getLogger("jax").setLevel(logging.WARNING)  # It tells of every backend not there.
    _pass_over_absent_tpu()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app.run(lambda argv: program(), flags_parser=_parse_flags)
    except KeyboardInterrupt:
        for number in handlers:  # A second Ctrl-C must not cut the message off.
            signal.signal(number, signal.SIG_IGN)
        print(f"\n{name}: {stopped}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left, as in `| head`: nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if flags.FLAGS.is_parsed() and _TRACEBACK.value:
            traceback.print_exc()
        print(f"{name}: {describe(error)}", file=sys.stderr, flush=True)
        return MISTAKE
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("app.run returned")


def describe(error: BaseException) -> str:
    """An error on one line: the last of its own, or the operating system's word and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A multi-line message ends in the error that caused it, behind its type.
    return re.sub(r"^\w+Error: ", "", lines[-1]) if lines else type(error).__name__


def read_config(flag: flags.FlagHolder[Any]) -> dict[str, Any]:
    """The config that a flag names, as nested dicts.

    Raises:
      ValueError, FileNotFoundError: the flag is missing, or the file that it names is.
    """
    if flag.value is None:
        raise ValueError(f"--{flag.name} is missing: name a file, as configs/smollm2.py")
    path = config_flags.get_config_filename(flags.FLAGS[flag.name])
    file = path.split(":")[0]
    if not os.path.isfile(file):
        raise FileNotFoundError(f"--{flag.name}={path}: there is no file {file!r}")
    return flag.value.copy_and_resolve_references().to_dict()


def require_folder(flag: str, path: pathlib.Path) -> None:
    """Raises ValueError where a flag that is to name a folder, which may be new, names a file."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--{flag}={path} is a file; accepted is a folder")


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, apart by version and by the processor's abilities."""
    if not _CACHE.value:
        return
    folder = pathlib.Path(_CACHE.value).expanduser() / f"jax-{jax.__version__}-{_processor()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def wait(tree: Any, nap_fn: Callable[[], None] = lambda: None) -> None:
    """Waits for a running program in short naps, so that Ctrl-C gets through at once.

    Args:
      nap_fn: called before each nap.
    """
    for array in jax.tree.leaves(tree):
        while not array.is_ready():
            nap_fn()
            time.sleep(0.01)


def read_mesh(text: str | None) -> Mesh | None:
    """The mesh of a flag such as "data=8" or "replica=2,data=2,model=2"; None where it is not set.

    An axis that is not named has one device, but for `data`, which has all that are left.

    Raises:
      ValueError: not of that form, or not as many devices as there are.
    """
    if text is None:
        return None
    sizes = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes or not re.fullmatch(r"-?\d+", size):
            raise ValueError(
                f"--mesh={text}: {part!r} is not accepted: name each of {', '.join(AXES)} once at "
                "most, as in replica=2,data=4,model=1"
            )
        sizes[name] = int(size)
    try:
        return make_mesh(**sizes)
    except ValueError as error:
        raise ValueError(f"--mesh={text}: {error}") from None


def say_when(is_stopped: Callable[[], bool], notice: str) -> Callable[[], None]:
    """A `nap_fn` for `wait` that says the notice on stderr, once, when a stop was asked for."""
    said = False

    def speak() -> None:
        nonlocal said
        if is_stopped() and not said:
            said = True
            print(f"\n{notice}", file=sys.stderr, flush=True)

    return speak


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """Everything but the program's name must be a flag; raises ValueError for what is not."""
    try:
        rest = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise ValueError(f"{describe(error)} (--help lists the flags)") from error
    except (flags.Error, OSError) as error:
        raise ValueError(describe(error)) from error
    except (AttributeError, KeyError, TypeError) as error:
        # So ml_collections says that an override names no field of the config.
        argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
        overrides = [arg.split("=")[0] for arg in argv if re.match(r"--?config\.", arg)]
        if not overrides:
            raise
        config = _load_config(argv)
        lacks = [f"{name}: {lack}" for name in overrides if (lack := _find_lack(config, name))]
        said = "; ".join(lacks) or f"{', '.join(overrides)}: {describe(error)}"
        raise ValueError(said) from error
    if len(rest) > 1:
        raise ValueError(f"not a flag: {rest[1]!r} (--help lists the flags)")
    return rest


def _load_config(argv: Sequence[str]) -> Any:
    """The config that --config names, without what the other flags change in it."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    path = next(after for word, after in itertools.pairwise(words) if word.strip("-") == "config")
    return flags.FLAGS["config"].parser.parse(path)


def _find_lack(config: Any, override: str) -> str | None:
    """What to say of an override whose field is not in a config; None where it is there."""
    known, *names = override.lstrip("-").split(".")
    for name in names:
        if not isinstance(config, ConfigDict):
            return f"no such field in --config; {known} has none"
        if name not in config:
            return f"no such field in --config; those of {known} are {', '.join(config)}"
        known, config = f"{known}.{name}", config[name]
    return None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _pass_over_absent_tpu() -> None:
    """Keeps libtpu, which may be there for compiling alone, from complaining of a missing TPU."""
    devices = pathlib.Path("/dev")
    chips = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    others = [name for name in plugins if importlib.util.find_spec(name)]
    if not (chips or others or os.environ.get("JAX_PLATFORMS")):
        jax.config.update("jax_platforms", "cpu")


def _keep_memory() -> None:
    """Has the C library keep what is freed, where it is glibc.

    XLA's CPU backend asks for the arrays of a program anew at each call. By default large ones are
    mapped, and given back, each time, and the system clears every page that it maps. A thread that
    is not the first has an arena of its own, which maps what is larger than 64 MB in any case: one
    arena for all.
    """
    mallopt = _find_in_libc("mallopt")
    if mallopt is None:
        return
    for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        mallopt(option, 2**31 - 1)
    mallopt(_ARENA_MAX, 1)


def return_memory() -> None:
    """Gives the system what `launch` has the C library keep: between searches, of gigabytes each.

    What one leaves free does not always fit the next, since arrays are aligned: both stay mapped.
    """
    malloc_trim = _find_in_libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _find_in_libc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, None where it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def _processor() -> str:
    """A short name of the instruction sets: code compiled for others may crash here."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line for line in lines if line.startswith(("flags", "Features"))]
    known = found[0] if found else platform.processor()
    digest = hashlib.sha256(f"{platform.machine()} {known}".encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
