"""Search inside the training step: rows against plain Python, one program against two and eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.core.mesh import make_mesh
from rlm_jax.data.packing import TokenBatch, check_batch
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.learning.collect import CollectConfig, collect_rows
from rlm_jax.learning.distillation import improve_policy
from rlm_jax.learning.networks import (
    LossConfig,
    assemble,
    init_adapted,
    init_networks,
    token_loss,
)
from rlm_jax.learning.search_step import (
    SearchStepConfig,
    init_search_state,
    learn,
    make_collect,
    make_search_step,
)
from rlm_jax.learning.targets import target_weights, value_tree
from rlm_jax.learning.update import OptimizerConfig, init_state, make_optimizer, spread_state
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.heads import HeadConfig, apply_value_head
from rlm_jax.models.lora import LoraConfig
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, begin, make_expand
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.tasks.device import DeviceTask, StepCheck
from rlm_jax.text.answers import make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule
from rlm_jax.text.tokenizer import ByteTokenizer

NUM_STRUCTURES, WIDTH, DEPTH, LONGEST = 8, 8, 3, 4
CFG = CollectConfig(num_paths=4, row_tokens=24, num_children=3, max_depth=DEPTH, min_visits=1.0)


def _count_steps(tables, prompt, length):
    return length * 0


def _check_parity(tables, state, tokens, length, ends):
    """Steps of odd sums are refuted; the third right one solves."""
    total = jnp.where(jnp.arange(tokens.shape[0]) < length, tokens, 0).sum()
    state = state + 1
    legal = total % 3 != 1
    return StepCheck(state, legal, legal & (state == DEPTH), jnp.uint32(0) + length * 0 == 1)


TASK = DeviceTask(lambda pieces: jnp.zeros(1), _count_steps, _check_parity)


@pytest.fixture(scope="module")
def parts():
    tokenizer = ByteTokenizer()
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        ffn_dim=48,
        qk_norm=True,
        tie_embeddings=True,
        context_length=64,
        eos_ids=tuple(tokenizer.eos_ids),
        bos_id=tokenizer.bos_id,
    )
    networks = init_networks(jax.random.key(0), model, HeadConfig((), "sigmoid"))
    rules = LanguageModel(
        policy=networks.policy,
        step_rule=make_step_rule(StepSpec("fixed", LONGEST), tokenizer),
        answer_rule=make_answer_rule(tokenizer),
        value_head=networks.value_head,
        task_tables=jnp.zeros(1),
    )
    strategy = make_puct(num_children=3, num_lanes=2, max_depth=DEPTH, num_simulations=6)
    language = LanguageConfig(
        model=model,
        sampling=SamplingConfig(),
        evaluator="value_head",
        num_nodes=31,
        max_depth=DEPTH,
        max_new_tokens=128,
        page_tokens=4,
        value_fn=apply_value_head,
        task=TASK,
        drop_illegal=False,
    )
    keys = jax.random.split(jax.random.key(1), NUM_STRUCTURES)
    prompts = jax.random.randint(jax.random.key(2), (NUM_STRUCTURES, WIDTH), 65, 90)
    lengths = jnp.array([5, 8, 6, 7] * (NUM_STRUCTURES // 4), jnp.int32)
    prompts = jnp.where(jnp.arange(WIDTH) < lengths[:, None], prompts, 0)
    return model, networks, rules, strategy, language, (keys, prompts, lengths)


@pytest.fixture(scope="module")
def searched(parts):
    _model, _networks, rules, strategy, language, (keys, prompts, lengths) = parts

    def search(lm):
        structure, world = begin(lm, prompts, lengths, 128, cfg=language)
        return run_compiled(strategy, make_expand(language), lm, keys, world, structure)

    structure, world = jax.jit(search)(rules)
    rows, teaches = jax.jit(functools.partial(collect_rows, cfg=CFG))(
        structure, world.tokens, prompts, keys
    )
    return structure, world, rows, teaches


def test_rows_are_batches_and_some_teach(searched):
    structure, _, rows, teaches = searched
    check_batch(jax.tree.map(np.asarray, rows))
    assert rows.tokens.shape == (NUM_STRUCTURES * CFG.num_paths, CFG.row_tokens)
    assert teaches.any()
    assert structure.proven.any()


def _follow(structure, tokens, row, b):
    """The nodes whose steps a row consists of, read off its tokens."""
    nodes, at = [], int(structure.span_length[b, 0])
    end = int(row.segments.sum())
    node = 0
    while at < end:
        children = [
            c
            for c in np.flatnonzero(structure.parent[b] == node)
            if structure.alive[b, c]
            and (
                row.tokens[at : at + int(structure.span_length[b, c])]
                == tokens[b, c, : int(structure.span_length[b, c])]
            ).all()
        ]
        assert children, "a row's step is none of the node's children"
        node = int(max(children, key=lambda c: int(structure.span_length[b, c])))
        nodes.append(node)
        at += int(structure.span_length[b, node])
    return nodes


def test_labels_are_the_improved_policy_of_the_siblings(parts, searched):
    prompts = parts[-1][1]
    structure, world, rows, _ = jax.device_get(searched)

    @jax.jit
    def aim(structure):
        tree = value_tree(structure, structure.proven.astype(jnp.float32), rule=CFG.value_rule)
        improved = improve_policy(structure, tree, num_children=3, min_visits=CFG.min_visits)
        return tree, improved, target_weights(structure, tree, min_visits=CFG.min_visits)

    tree, improved, known = jax.device_get(aim(structure))
    tokens = world.tokens
    num_choices = 0
    for number in range(rows.tokens.shape[0]):
        b = number // CFG.num_paths
        row = jax.tree.map(lambda array, number=number: array[number], rows)
        length = int(structure.span_length[b, 0])
        assert (row.tokens[:length] == np.asarray(prompts[b])[:length]).all()
        at, above = length, 0
        assert row.value_weight[at - 1] == known[b, 0]
        for node in _follow(structure, tokens, row, b):
            children = [int(c) for c in improved.children[b, above] if c >= 0]
            weights = dict(zip(children, improved.weights[b, above], strict=False))
            size = int(structure.span_length[b, node])
            for place in range(size):
                expected: dict[int, float] = {}
                for child in children:
                    same = (tokens[b, child, :place] == tokens[b, node, :place]).all()
                    if same and place < int(structure.span_length[b, child]):
                        word = int(tokens[b, child, place])
                        expected[word] = expected.get(word, 0.0) + float(weights[child])
                total = sum(expected.values())
                found: dict[int, float] = {}
                for word, share in zip(row.soft_ids[at], row.soft_weights[at], strict=True):
                    if share > 0:
                        found[int(word)] = found.get(int(word), 0.0) + float(share)
                wanted = {w: s / total for w, s in expected.items() if s > 0} if total else {}
                assert found == pytest.approx(wanted, abs=1e-5)
                assert row.loss_weight[at] == (total > 0)
                num_choices += len(found) > 1
                at += 1
            assert row.value_weight[at - 1] == known[b, node]
            assert row.value_target[at - 1] == pytest.approx(float(tree.value[b, node]))
            above = node
    assert num_choices > 10


STEP = SearchStepConfig(batch_rows=16, num_updates=2, replay_rows=64)


def _make_step(parts, mesh=None, lora=None, cfg=None):
    model, networks, rules, strategy, language, batch = parts
    learned = networks
    if lora is not None:
        learned = init_adapted(jax.random.key(6), networks, model, lora)
    rates = OptimizerConfig(name="adamw", learning_rate=2e-2, num_steps=20, warmup_steps=1)
    optimizer = make_optimizer(rates, learned)
    loss = functools.partial(token_loss, model=model, cfg=cfg or LossConfig(), lora=lora)
    if mesh is not None:
        # What was learned over the mesh before, such as a network for states, lies there.
        rules = spread_state(mesh, rules)
    collect = make_collect(
        rules, language=language, strategy=strategy, cfg=CFG, budget_tokens=128, mesh=mesh
    )
    state = init_search_state(
        init_state(learned, optimizer), jax.random.key(5), collect, batch, STEP, networks
    )
    return state, collect, {"cfg": STEP, "loss": loss, "optimizer": optimizer}


def test_adapters_are_learned_by_search_and_move_away_from_their_base(parts):
    networks, batch = parts[1], parts[-1]
    lora = LoraConfig(rank=2)
    state, collect, options = _make_step(parts, lora=lora, cfg=LossConfig(kl_coef=0.01))
    learned = sum(leaf.size for leaf in jax.tree.leaves(state.train.params))
    assert learned < sum(leaf.size for leaf in jax.tree.leaves(networks)) / 4
    step = make_search_step(collect, **options, lora=lora)
    state, divergences = jax.tree.map(jnp.copy, state), []
    for _ in range(2):
        state, metrics = step(state, *batch, networks.policy)
        divergences.append(float(metrics["kl"].mean()))
    # Of two updates a step, the first of all is the only one at the base.
    assert 0 < divergences[0] < divergences[1]
    assert bool(state.train.healthy)
    found = assemble(state.train.params, networks.policy, lora).policy
    assert (np.asarray(found.embed) == np.asarray(networks.policy.embed)).all()
    assert (np.asarray(found.layers[1].w_up) != np.asarray(networks.policy.layers[1].w_up)).any()


def test_one_program_is_two_and_loss_falls(parts):
    batch = parts[-1]
    state, collect, options = _make_step(parts)
    step = make_search_step(collect, **options)
    apart = jax.jit(functools.partial(learn, **options))
    other = state
    losses = []
    for number in range(4):
        keys = jax.vmap(jax.random.fold_in, (0, None))(batch[0], number)
        other, _ = apart(other, jax.jit(collect)(other.train.params, keys, *batch[1:]))
        state, metrics = step(jax.tree.map(jnp.copy, state), keys, *batch[1:])
        losses.append(float(metrics["choice_loss"].mean()))
        assert 0 <= float(metrics["search_solved"].mean()) <= 1
    for one, two in zip(jax.tree.leaves(state.train), jax.tree.leaves(other.train), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=1e-6)
    assert int(state.train.step) == 8
    assert bool(state.train.healthy)
    assert losses[-1] < losses[0]


def test_eight_devices_learn_what_one_learns(parts):
    batch = parts[-1]
    state, collect, options = _make_step(parts)
    plain, metrics = make_search_step(collect, **options)(jax.tree.map(jnp.copy, state), *batch)
    mesh = make_mesh(data=8)
    state, collect, options = _make_step(parts, mesh)
    state = spread_state(mesh, jax.tree.map(jnp.copy, state))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_search_step(collect, **options, mesh=mesh, shardings=shardings)
    split, split_metrics = step(state, *batch)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == shardings
    for one, two in zip(jax.tree.leaves(plain.train), jax.tree.leaves(split.train), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=1e-5)
    for name, value in metrics.items():
        assert float(split_metrics[name].mean()) == pytest.approx(float(value.mean()), abs=1e-5)


def test_a_search_without_a_verifier_is_refused(parts):
    _, _, rules, strategy, language, _ = parts
    with pytest.raises(ValueError, match="verifies on the device"):
        make_collect(
            rules,
            language=dataclasses.replace(language, task=None),
            strategy=strategy,
            cfg=CFG,
            budget_tokens=8,
        )


def test_prompts_must_fit_into_rows(parts, searched):
    structure, world, _, _ = searched
    with pytest.raises(ValueError, match="prompts of 30 tokens in rows of 24"):
        collect_rows(
            structure,
            world.tokens,
            jnp.zeros((NUM_STRUCTURES, 30), jnp.int32),
            parts[-1][0],
            cfg=CFG,
        )
    assert isinstance(searched[2], TokenBatch)
