"""Packaging of rlm_jax. Core stays light; everything heavier is an extra."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "rlm_jax/__init__.py").read_text())[1]

CORE = [
    "absl-py>=2.1",
    "flax>=0.12",
    "jax>=0.10",
    "jaxtyping>=0.3",
    "jinja2>=3.1",
    "ml_collections>=1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.5",
    "rich>=13",
    "safetensors>=0.5",
]
TEXT = ["sentencepiece>=0.2", "tokenizers>=0.21"]
GGUF = ["gguf>=0.17"]
HUB = ["huggingface_hub>=0.30"]
TRAIN = [
    "array_record>=0.8",
    "grain>=0.2.12",
    "importlib_resources>=6",
    "orbax-checkpoint>=0.11",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",
]
REASONING_GYM = ["reasoning-gym>=0.1.19"]
DEMO = TEXT + GGUF
# Compiles for TPU on any such machine, for the tests that read what the compiler made.
AOT = ['libtpu; platform_system == "Linux" and platform_machine == "x86_64"']
# mctx: what the searches are held against.
TEST = [*DEMO, *HUB, *AOT, *TRAIN, "beartype>=0.20", "hypothesis>=6", "mctx>=0.0.6", "pytest>=8"]
TEST += ["pytest-xdist>=3"]
DEV = [*TEST, "pre-commit>=4", "pyright>=1.1.400", "ruff>=0.11"]

setup(
    name="rlm_jax",
    version=VERSION,
    description="Build, train and search reasoning language models in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlm_jax", "rlm_jax.*"]),
    package_data={"rlm_jax": ["networks/*/*"]},
    install_requires=CORE,
    extras_require={
        "text": TEXT,
        "gguf": GGUF,
        "hub": HUB,
        "train": TRAIN,
        "reasoning_gym": REASONING_GYM,
        "demo": DEMO,
        "test": TEST,
        "dev": DEV,
    },
)
