"""A training run's checkpoints (orbax): written while training goes on, complete or not there.

The one idea: a state is stored flat, as numbered arrays beside a list of their names, so that what
a checkpoint holds is compared with what a program wants leaf by leaf before anything is read, and
a part of a state (the parameters of a run, for evaluation) is read like all of it.

A step is a folder of its own that gets its name once all of it is written: a program killed at any
moment leaves whole steps behind. What is no array (config, tokenizer, the data iterator's position)
is JSON in the same folder. Nothing is pickled, and no class that a file names is looked up.
"""

import base64
import binascii
import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.types import PyTree

_VERSION = 1
# The two items of a step.
_ARRAYS, _ABOUT = "arrays", "about"
_BYTES = "__bytes__"


@dataclasses.dataclass
class _Retention:
    """Which steps stay: the last few, and those with the best scores. Orbax asks it at a save.

    scores: of the steps that have one; larger is better.
    """

    keep_last: int
    keep_best: int
    metric: str | None
    larger_is_better: bool
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def note(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes a step's score from its metrics, if they hold it."""
        value = metrics.get(self.metric or "")
        if value is not None:
            self.scores[step] = value if self.larger_is_better else -value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.keep_last :], *self.rank(steps)[: self.keep_best]}
        return [step in kept for step in steps]

    def rank(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps` that have a score, the best first, and of equal ones the later."""
        scored = [step for step in steps if step in self.scores]
        return sorted(scored, key=lambda step: (self.scores[step], step), reverse=True)


class Checkpoints:
    """The steps of a run in its folder: made by `open_checkpoints`, closed by `with`."""

    def __init__(self, folder: Path, manager: Any, retention: _Retention, read_only: bool):
        self.folder = folder
        self.manager = manager
        self.retention = retention
        self.read_only = read_only

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that are there, or about to be, in rising order."""
        return sorted(self.manager.all_steps())

    def latest_step(self) -> int | None:
        """The last step; None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric; None where no step has it."""
        return next(iter(self.retention.rank(self.steps())), None)

    def wait(self) -> None:
        """Returns once all that was saved is on disk; raises what went wrong on the way."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads that write."""
        self.manager.close()


def open_checkpoints(
    folder: str | os.PathLike[str],
    *,
    keep_last: int = 3,
    keep_best: int = 0,
    metric: str | None = None,
    larger_is_better: bool = True,
    read_only: bool = False,
) -> Checkpoints:
    """Opens a run's folder, makes it if need be, and clears away what a killed run left half done.

    One program at a time may write to a folder.

    Args:
      keep_last: how many steps stay, counted from the last.
      keep_best: how many stay beside them, the best by `metric`.
      metric: a name in the metrics given to `save_checkpoint`; a step whose metric is missing or
        not finite is none of the best.
      read_only: changes nothing in the folder, which must be there.

    Raises:
      FileNotFoundError: there is no such folder to read.
      ValueError: a count is out of range, `metric` is missing, `folder` is a file, or orbax is not
        installed.
    """
    folder = Path(folder).expanduser().resolve()
    if keep_last < 1 or keep_best < 0:
        raise ValueError(f"keep_last={keep_last} must be >= 1 and keep_best={keep_best} >= 0")
    if keep_best and metric is None:
        raise ValueError(f"keep_best={keep_best} needs the name of a metric")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, not a folder of checkpoints")
    if read_only and not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder of checkpoints")
    ocp = _import_orbax()
    retention = _Retention(keep_last, keep_best, metric, larger_is_better)
    options = ocp.CheckpointManagerOptions(
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        preservation_policy=retention,
    )
    manager = ocp.CheckpointManager(folder, options=options)
    checkpoints = Checkpoints(folder, manager, retention, read_only)
    if metric is not None:
        for step in checkpoints.steps():
            # What a killed run has half deleted has no score, and is deleted at the next save.
            with contextlib.suppress(ValueError):
                retention.note(step, _read_about(checkpoints, step)["metrics"])
    return checkpoints


def save_checkpoint(
    checkpoints: Checkpoints,
    step: int,
    state: PyTree,
    extra: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> bool:
    """Starts to write a step and returns once `state` may be changed or donated.

    Waits for the step before, if that is not on disk yet. Steps that need not stay are deleted once
    this one is complete.

    Args:
      state: a tree of jax arrays (RNG keys among them) and numpy arrays.
      extra: JSON (mappings by string, sequences, strings, finite numbers, booleans, None), and
        bytes anywhere in it.
      metrics: numbers of this step, among them the one that chooses the best.

    Returns:
      False when the last step is this one: it stays as it is.

    Raises:
      ValueError: the step is before the last one, a leaf of the state is no array, or a value of
        `extra` is not JSON; names it. Or the folder was opened to be read.
    """
    if checkpoints.read_only:
        raise ValueError(f"{checkpoints.folder}: was opened to be read alone")
    latest = checkpoints.latest_step()
    if latest is not None and step <= latest:
        if step == latest:
            return False
        raise ValueError(
            f"{checkpoints.folder}: step {step} is before step {latest}, which is saved already: "
            "continue from the last step, or write to another folder"
        )
    ocp = _import_orbax()
    named = _name_leaves(state)
    known = {name: float(value) for name, value in (metrics or {}).items()}
    known = {name: value if math.isfinite(value) else None for name, value in known.items()}
    about = {
        "version": _VERSION,
        "leaves": [[name, *_describe(name, leaf)] for name, leaf in named],
        "metrics": known,
        "extra": _encode(extra, "extra"),
    }
    arrays = {str(i): _to_bits(leaf) for i, (_, leaf) in enumerate(named) if leaf.size}
    if not arrays:
        raise ValueError("the state holds no numbers: there is nothing to save")
    items = {_ARRAYS: ocp.args.PyTreeSave(arrays), _ABOUT: ocp.args.JsonSave(about)}
    checkpoints.retention.note(step, known)
    checkpoints.manager.save(step, args=ocp.args.Composite(**items), force=True)
    return True


def restore_checkpoint(
    checkpoints: Checkpoints, like: PyTree, step: int | None = None, *, part: str = ""
) -> tuple[PyTree, dict[str, Any]]:
    """Reads a step's state, and what was saved beside it.

    Args:
      like: a tree of arrays or `jax.ShapeDtypeStruct`; a leaf with a sharding is restored with it,
        on whatever mesh it was saved, any other as an array of the default device, and a numpy
        array as a numpy array.
      step: the last one by default.
      part: reads that part of the saved state alone ("params" of a dict or struct that has it);
        `like` is then a tree like the part.

    Returns:
      (state, extra); sequences of `extra` have become lists.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: the saved state has other leaves than `like`; names the first. Or it is damaged.
    """
    step = _find_step(checkpoints, step)
    about = _read_about(checkpoints, step)
    named = _name_leaves(like, part)
    places = _match_leaves(f"{checkpoints.folder} step {step}", about["leaves"], named, part)
    wanted = {str(place): leaf for place, (_, leaf) in zip(places, named, strict=True) if leaf.size}
    arrays = _read_arrays(checkpoints, step, wanted) if wanted else {}
    leaves = [
        _from_bits(arrays[str(place)], leaf) if leaf.size else _make_empty(leaf)
        for place, (_, leaf) in zip(places, named, strict=True)
    ]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return state, _decode(about["extra"])


def read_extra(checkpoints: Checkpoints, step: int | None = None) -> dict[str, Any]:
    """What was saved beside a step's state, the last by default; raises as `restore_checkpoint`."""
    return _decode(_read_about(checkpoints, _find_step(checkpoints, step))["extra"])


def _import_orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ValueError("checkpoints need orbax: pip install 'rlm_jax[train]'") from error
    logger = logging.getLogger("absl")
    if _drop_chatter not in logger.filters:
        logger.addFilter(_drop_chatter)
    return ocp


def _drop_chatter(record: logging.LogRecord) -> bool:
    """Takes what orbax tells of every save, some forty lines, out of a program's log."""
    return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


def _find_step(checkpoints: Checkpoints, step: int | None) -> int:
    checkpoints.wait()
    steps = checkpoints.steps()
    if not steps:
        raise FileNotFoundError(f"{checkpoints.folder}: holds no checkpoint")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{checkpoints.folder}: no checkpoint of step {step}, only {there}")
    return steps[-1] if step is None else step


def _read_about(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    ocp = _import_orbax()
    args = ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()})
    try:
        about = checkpoints.manager.restore(step, args=args)[_ABOUT]
        version = about["version"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_say_damaged(checkpoints, step, error)) from error
    if version != _VERSION:
        raise ValueError(f"{checkpoints.folder} step {step}: version {version!r}, not {_VERSION}")
    return about


def _read_arrays(
    checkpoints: Checkpoints, step: int, wanted: Mapping[str, Any]
) -> dict[str, jax.Array | np.ndarray]:
    ocp = _import_orbax()
    how = {}
    for name, leaf in wanted.items():
        sharding = _sharding_of(leaf)
        if sharding is None:
            how[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            how[name] = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    item = dict.fromkeys(wanted, 0)
    read = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    try:
        return checkpoints.manager.restore(step, args=ocp.args.Composite(**{_ARRAYS: read}))[
            _ARRAYS
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_say_damaged(checkpoints, step, error)) from error


def _say_damaged(checkpoints: Checkpoints, step: int, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"{checkpoints.folder} step {step}: not a readable checkpoint of a run: {cause}"


def _name_leaves(tree: PyTree, part: str = "") -> list[tuple[str, Any]]:
    """Leaves by dotted name ("params.layers.0.wq"), as they are called in the whole state."""
    named = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named.append((".".join(filter(None, (part, name))), leaf))
    seen = set()
    for name, _ in named:
        if name in seen:
            raise ValueError(f"two leaves of the state are called {name!r}")
        seen.add(name)
    return named


def _match_leaves(
    source: str, saved: Sequence[Any], named: Sequence[tuple[str, Any]], part: str
) -> list[int]:
    """Where each wanted leaf lies among the saved ones; ValueError where they differ."""
    found = {name: (place, dtype, shape) for place, (name, dtype, shape) in enumerate(saved)}
    places = []
    for name, leaf in named:
        want_dtype, want_shape = _describe(name, leaf)
        if name not in found:
            raise ValueError(f"{source}: {name} is not in it; wanted is {want_dtype}{want_shape}")
        place, dtype, shape = found.pop(name)
        if (dtype, shape) != (want_dtype, want_shape):
            raise ValueError(
                f"{source}: {name} is {dtype}{shape}, wanted is {want_dtype}{want_shape}"
            )
        places.append(place)
    inside = [name for name in found if not part or name == part or name.startswith(part + ".")]
    if inside:
        raise ValueError(f"{source}: {inside[0]} is in it, and there is no place for it")
    return places


def _describe(name: str, leaf: Any) -> tuple[str, list[int]]:
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise ValueError(f"{name} is {type(leaf).__name__}: accepted are jax and numpy arrays")
    kinds = (np.number, np.bool_, jax.dtypes.prng_key)
    if not any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds):
        raise ValueError(f"{name} has dtype {leaf.dtype}: accepted are numbers and RNG keys")
    return str(leaf.dtype), list(leaf.shape)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_bits(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """What is written: keys as their data, and a numpy array as it is now."""
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _from_bits(bits: jax.Array | np.ndarray, leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, np.ndarray):
        return np.asarray(bits)
    if isinstance(bits, np.ndarray):
        bits = jnp.array(bits)  # A copy: a program may be given it for its own use.
    return jax.random.wrap_key_data(bits, impl=leaf.dtype) if _is_key(leaf) else bits


def _make_empty(leaf: Any) -> jax.Array | np.ndarray:
    """An array without numbers, which tensor stores do not keep."""
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        width = jax.eval_shape(jax.random.key_data, leaf).shape[-1]
        data = jnp.zeros((*leaf.shape, width), jnp.uint32)
        return jax.random.wrap_key_data(data, impl=leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype, device=_sharding_of(leaf))


def _sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """None for what may lie on the default device without being bound to it."""
    if isinstance(leaf, np.ndarray) or not getattr(leaf, "committed", True):
        return None
    return leaf.sharding


def _encode(value: Any, where: str) -> Any:
    """A value as JSON, bytes as an object of one field; ValueError names what neither is."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or name == _BYTES:
                raise ValueError(f"{where} has the name {name!r}: accepted are other strings")
        return {name: _encode(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where} is {value!r}: accepted are JSON values and bytes")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_BYTES}:
        try:
            return base64.b64decode(value[_BYTES], validate=True)
        except (binascii.Error, TypeError) as error:
            raise ValueError(f"bytes of a checkpoint are damaged: {error}") from None
    return {name: _decode(item) for name, item in value.items()}
