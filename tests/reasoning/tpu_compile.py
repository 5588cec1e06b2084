"""Compiles a search for TPUs that are not there, in a process of its own.

    python tests/reasoning/tpu_compile.py CASE FOLDER

writes search.txt (the optimized HLO) and facts.json into the folder. The HLO is what the compiler
dumps: jaxlib cannot always read back what libtpu gives it (asynchronous slices on v5p). libtpu is
told by the
environment that it needs no TPU, and that other processes may have loaded it too; it must not be
loaded into the process of the tests. A process that says `No libtpu.` has not found it.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.sharding import fits, partition_spec
from rlm_jax.core.types import PyTree
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import abstract_params, param_axes
from rlm_jax.models.presets import SMOLLM2_135M
from rlm_jax.reasoning.drive import Limits, run_compiled
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, begin, make_expand
from rlm_jax.reasoning.sharding import BATCH_SPEC, abstract_outputs, count_shards, shard_search
from rlm_jax.reasoning.strategies import puct
from rlm_jax.text.answers import make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule
from rlm_jax.text.tokenizer import ByteTokenizer

SMALL = dataclasses.replace(
    SMOLLM2_135M,
    vocab_size=1024,
    num_layers=2,
    model_dim=256,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=512,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A search to compile; `batch` is of one shard, a step has 32 tokens, the dtype is bfloat16."""

    topology: str
    mesh: tuple[int, int, int]
    model: ModelConfig
    batch: int
    num_children: int
    num_nodes: int
    max_depth: int
    max_new_tokens: int
    page_tokens: int
    prompt_tokens: int = 128


_SMALL = {"model": SMALL, "batch": 8, "num_children": 4, "num_nodes": 257, "max_depth": 2}
_SMALL |= {"max_new_tokens": 8192, "page_tokens": 8}
_SMOLLM2 = {"model": SMOLLM2_135M, "batch": 16, "num_nodes": 129, "max_depth": 8}
_SMOLLM2 |= {"max_new_tokens": 4096, "page_tokens": 16}
CASES = {
    "v5e": Case("v5e:2x2", (1, 4, 1), **_SMALL),
    "v5p": Case("v5p:2x2x1", (2, 2, 1), **_SMALL),
    "v5e-model": Case("v5e:2x2", (1, 2, 2), **_SMALL),
    "v5e-smollm2": Case("v5e:4x4", (1, 16, 1), num_children=4, **_SMOLLM2),
    "v5p-smollm2": Case("v5p:2x2x4", (2, 8, 1), num_children=16, **_SMOLLM2),
}


def compile_search(case: Case, dump_folder: str) -> tuple[jax.stages.Compiled, PyTree]:
    """The compiled search, and the abstract world it starts from; the compiler dumps its HLO."""
    devices = topologies.get_topology_desc(case.topology, "tpu").devices
    mesh = make_mesh(*case.mesh, devices=list(devices))
    config = LanguageConfig(
        model=case.model,
        num_nodes=case.num_nodes,
        max_depth=case.max_depth,
        max_new_tokens=case.max_new_tokens,
        page_tokens=case.page_tokens,
    )
    strategy = puct.make_puct(num_children=case.num_children, max_depth=case.max_depth)
    expand = make_expand(config)

    def search(lm, keys, world, structure):
        return run_compiled(
            strategy, expand, lm, keys, world, structure, limits=Limits(step_tokens=32)
        )

    lm = _abstract_model(mesh, case.model)
    rows = NamedSharding(mesh, BATCH_SPEC)
    batch = case.batch * count_shards(mesh)
    number = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    prompts = jax.ShapeDtypeStruct((batch, case.prompt_tokens), jnp.int32, sharding=rows)
    keys = jax.ShapeDtypeStruct((batch,), jax.random.key(0).dtype, sharding=rows)
    begin_batch = shard_search(functools.partial(begin, cfg=config), mesh)
    begun = jax.jit(begin_batch).lower(lm, prompts, number, number).compile()
    structure, world = abstract_outputs(begun)
    jitted = jax.jit(shard_search(search, mesh), donate_argnums=2)
    lowered = jitted.lower(lm, keys, world, structure)
    options = {"xla_dump_to": dump_folder, "xla_dump_hlo_as_text": True}
    return lowered.compile(compiler_options=options), world


def _abstract_model(mesh: Mesh, cfg: ModelConfig) -> LanguageModel:
    tokenizer = ByteTokenizer()

    def whole(array):
        # The rules' tables are as long as the vocabulary.
        shape = [cfg.vocab_size if n == tokenizer.vocab_size else n for n in array.shape]
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype, sharding=sharding)

    def split(array, names):
        spec = fits(mesh, partition_spec(names), array.shape)
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    params = abstract_params(cfg, jnp.bfloat16)
    policy = jax.tree.map(split, params, param_axes(cfg, mesh.shape["model"]))
    rule, answers = make_step_rule(StepSpec("fixed", 32), tokenizer), make_answer_rule(tokenizer)
    return LanguageModel(policy, *jax.tree.map(whole, (rule, answers)))


def main(case_name: str, folder: str) -> None:
    """Compiles a case and writes what there is to know about it."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("No libtpu.")
    with tempfile.TemporaryDirectory() as dump_folder:
        compiled, world = compile_search(CASES[case_name], dump_folder)
        (text,) = pathlib.Path(dump_folder).glob("*after_optimizations.txt")
        shutil.move(text, pathlib.Path(folder, "search.txt"))
    memory = compiled.memory_analysis()
    pool = world.pages.pools[0]
    facts = {
        "pool_shape": pool.sharding.shard_shape(pool.shape),
        "vocab_size": CASES[case_name].model.vocab_size,
        "num_pools": len(world.pages.pools),
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
    pathlib.Path(folder, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
