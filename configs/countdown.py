"""A small transformer learns Countdown from scratch, and searches with what it learned.

Command:  python experiments/train.py --config=configs/countdown.py --workdir=DIR
Hardware: two CPU cores, 3 GB of memory.
Expected: 12,000 updates of the value network, of the policy 6,000 supervised ones and 5,300 on
corrected walks; by the rates of a CPU that multiplies bfloat16 in hardware (9, 3.3 and 1.4 a
second; add --config.train.loss.matmul_dtype=bfloat16) about two hours, more in float32;
accuracies in docs/results.md. Then
python experiments/evaluate.py --config=configs/countdown.py --model=DIR/policy \
    --split=countdown4-inputs --strategy=greedy,best_first --max_expansions=8,16 --out=DIR/results

`--config=configs/countdown.py:smoke` is the same program at a size that runs in seconds and learns
nothing of use; solve.py and evaluate.py take it with the --model=DIR/policy that it trained.
`:scarce` is a smaller network with no more than 4,096 demonstrations, for experiments/improve.py:
what is left to learn it has to find by search. `:scarce_legal` is the same where chains and
searches are held to legal lines: the rules are known, which line leads on is not.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

LOOK_AHEAD = ("best_first_controlled", "best_first_widening_controlled")


def get_config(variant: str = "") -> ConfigDict:
    """The settings of train.py (`train`), and of solve.py and evaluate.py (all others)."""
    if variant not in ("", "smoke", "scarce", "scarce_legal"):
        raise ValueError(
            f"configs/countdown.py:{variant}: accepted are smoke, scarce, scarce_legal, or nothing"
        )
    config = ConfigDict()
    config.model = "package:countdown"
    config.dtype = "float32"
    config.quantize = placeholder(str)
    config.task = "countdown"
    config.use_verifier = True
    config.step = ConfigDict({"kind": "newline", "max_tokens": 16})
    # A network of its own that reads what is left, and the policy's head: the one judges three
    # numbers and more far better, the other two numbers with a target that no training saw.
    config.evaluator = "state_value=0.5,value_head=0.5"
    config.aggregate = "last"
    config.mixture = "geometric"
    config.num_rollouts = 4
    config.rollout_tokens = 64
    config.rollout_discount = 1.0
    config.dead_value = 0.0
    config.drop_illegal = True
    config.budget_tokens = 2000
    config.batch_size = 64
    config.bucket_tokens = 16
    config.page_tokens = 4
    config.max_depth = 6

    sampling = {"method": "sample", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    sampling |= {"min_ratio": 0.0, "no_repeats": False, "copy_returns": False, "legal_only": False}
    sampling["outcome_weight"] = 0.0
    sampling |= {"return_bias": 0.0, "doubt_weight": 0.0}
    distinct = {**sampling, "method": "stochastic_beam"}
    # A chain may go back, and try again: it takes more lines than the tree is deep.
    chain = {"max_depth": 32, "max_refused": 0, "may_err": False}
    config.greedy = ConfigDict({**chain, "sampling": {**sampling, "method": "greedy"}})
    # The same chain, decoded so that from one state it writes no line twice, and goes back to
    # states that it has left. It does so less readily: taught by a solver that goes back from every
    # lost state at once, it would leave states that it cannot judge.
    no_repeats = {**sampling, "method": "greedy", "no_repeats": True}
    careful = {**no_repeats, "copy_returns": True}
    # With something new in every line it has use for more of them, and a line of its own that does
    # not follow is one more that leads nowhere: it may go on from it, and back.
    longer = {**chain, "max_depth": 60, "may_err": True}
    config.greedy_no_repeats = ConfigDict({**longer, "sampling": {**careful, "return_bias": -2.0}})
    # It also goes back where the value network sees no way on, and hardly anywhere else.
    config.greedy_guided = ConfigDict(
        {**longer, "sampling": {**careful, "return_bias": -6.0, "doubt_weight": 1.0}}
    )
    # And it writes legal lines alone, weighed by what that network says of what they leave.
    controlled = {"legal_only": True, "outcome_weight": 1.0}
    config.greedy_controlled = ConfigDict(
        {**chain, "sampling": {**config.greedy_guided.sampling, **controlled}}
    )
    # Or where a line does not follow it writes another one.
    refereed = {**longer, "may_err": False, "max_refused": 40}
    config.greedy_legal = ConfigDict({**refereed, "sampling": {**careful, "return_bias": -1.5}})
    config.best_of_n = ConfigDict(
        {**chain, "num_chains": 16, "rule": "majority", "sampling": sampling}
    )
    tree = {"num_nodes": 257, "num_children": 16, "num_lanes": 1, "sampling": distinct}
    # The likeliest lines, taken by the odds of their values and what the policy thinks of them; few
    # where the policy is sure. Countdown of five and six numbers is better off with 8 children at
    # most, a min_ratio of 0.12 and twice the nodes, and best off with the next one.
    likeliest = {**sampling, "method": "beam", "min_ratio": 0.01}
    config.best_first = ConfigDict({**tree, "depth_bonus": 0.0, "prior_weight": 0.7})
    config.best_first.update({"num_nodes": 513, "merge_states": True, "sampling": likeliest})
    config.best_first.widen = False
    # One line at a time, the likeliest that its state has not written: few tokens, many expansions.
    config.best_first_widening = ConfigDict({**config.best_first, "widen": True, "num_children": 1})
    config.best_first_widening.sampling = ConfigDict(no_repeats)
    # Both, where the network weighs the lines before they are written. It is surer than the policy,
    # so lines that it thinks little of are tried too.
    ahead = {**controlled, "min_ratio": 0.003}
    config.best_first_controlled = ConfigDict(
        {**config.best_first, "sampling": {**likeliest, **ahead}}
    )
    config.best_first_widening_controlled = ConfigDict(
        {**config.best_first_widening, "sampling": {**no_repeats, **controlled}}
    )
    for name in LOOK_AHEAD:
        config[name].evaluator = "state_lookahead"
    # A state is worth its best move: the mean over all of them hides the one that solves it.
    config.puct = ConfigDict({**tree, "exploration": 0.3, "backup": "max", "merge_states": False})
    config.uct = ConfigDict({**tree, "exploration": 1.0})
    config.td_mcts = ConfigDict({**tree, "value_low": 0.0})
    config.beam = ConfigDict({**tree, "beam_width": 4})
    del config.beam.num_lanes
    config.gumbel = ConfigDict(
        {
            **tree,
            "num_simulations": 32,
            "num_lanes": 4,
            "max_considered": 8,
            "visits_per_round": 1,  # More fill late rounds: fewer calls, staler values.
            "fit_budget": True,
            "gumbel_scale": 0.0,
            "value_scale": 1.0,
        }
    )
    config.train = ConfigDict(_training())
    if variant == "smoke":
        _shrink(config)
    elif variant in ("scarce", "scarce_legal"):
        _make_scarce(config)
        for name in ("greedy", "best_first", "puct"):
            config[name].sampling.legal_only = variant == "scarce_legal"
    return config


def _muon(**settings: float) -> dict:
    """An optimizer's settings, but for those that are alike in every phase."""
    alike = {"name": "muon", "final_share": 0.02, "weight_decay": 0.0, "clip_norm": 1.0}
    return {**alike, "beta2": 0.98, **settings}


def _training() -> dict:
    return {
        "seed": 0,
        # A folder of networks, or package:countdown, to go on from instead of new ones.
        "begin_with": placeholder(str),
        "num_steps": 6_000,
        # Before all else, and by itself: a value network that reads what is left, and no more.
        "state_value": _state_value_phase(),
        "network": {
            "num_layers": 7,
            "model_dim": 192,
            "num_heads": 6,
            "ffn_dim": 512,
            "context_length": 512,
            "number_waves": True,  # Numbers' embeddings begin with what the numbers are.
        },
        "data": {
            "sizes": ((3, 0.05), (4, 0.8), (5, 0.15)),
            "line_share": 0.25,  # How lines end that solutions hardly have.
            "try_share": 0.0,  # All lines of small problems without a solution, in turn.
            "opening_share": 0.4,
            "state_share": 0.0,  # States alone, with all targets that they make (goal_coef).
            "small_share": 0.1,
            "wrong_share": 0.5,
            "stray_share": 0.3,
            "max_wrong": 5,
            "return_weight": 1.0,
            "sharpness": 0.5,
            "shard_examples": 4096,
            "num_shards": placeholder(int),  # These over and over; none: always new ones.
        },
        # Expert iteration: right solutions in records of solve.py or evaluate.py (of problems that
        # no test set holds) take the place of a share of the demonstrations.
        "records": {"paths": (), "share": 0.0, "max_per_problem": 4},
        "layout": {"num_rows": 20, "row_tokens": 128, "num_soft": 8},
        # Behind the supervised updates: chains by the network, every line corrected by the solver.
        # Then again for so many updates, as often as restarts says, each with other problems and a
        # learning rate that rises and falls anew. What comes out is the mean of all their ends.
        "walks": _walks_phase(),
        # Or goals, which learns beside it which of all targets a state can be made (goal_coef); or
        # hl_gauss, a histogram, with value_loss hl_gauss.
        "value_head": "sigmoid",
        "loss": {
            "value_coef": 0.25,
            "goal_coef": 0.0,
            "value_loss": "bce",
            "z_coef": 0.0,
            "matmul_dtype": "float32",  # Of the products. bfloat16 pays where hardware has it.
        },
        "optimizer": _muon(
            learning_rate=1e-2, adam_learning_rate=2e-3, warmup_steps=200, decay_share=0.4
        ),
        "num_microbatches": 1,
        "log_steps": 100,
        "checkpoint_steps": 500,
        "eval_steps": 2000,
        "eval_problems": 100,
        "keep_best": 0,  # Checkpoints beside the last two, by the evaluation during training.
        "best_metric": "greedy_accuracy",
        "search": _search_phase(),
    }


def _state_value_phase() -> dict:
    return {
        "num_steps": 8_000,
        "network": {
            "num_layers": 4,
            "model_dim": 128,
            "num_heads": 4,
            "ffn_dim": 320,
            "num_numbers": 8192,  # With rows of their own: most products of two numbers.
        },
        "data": {
            "num_states": 192,
            "sizes": ((2, 0.1), (3, 0.62), (4, 0.24), (5, 0.04)),
            "small_share": 0.15,
            "deep_share": 0.2,
            "whole_share": 0.05,
            "quotient_share": 0.25,
        },
        "optimizer": _muon(
            learning_rate=1e-2, adam_learning_rate=2e-3, warmup_steps=50, decay_share=0.5
        ),
        # Behind it: the same network as one that is asked, of each state about so many goals.
        "asked": {
            "num_steps": 5_000,
            "num_goals": 16,
            "optimizer": _muon(
                learning_rate=5e-3, adam_learning_rate=1e-3, warmup_steps=50, decay_share=0.5
            ),
        },
    }


def _walks_phase() -> dict:
    return {
        "num_steps": 2_800,
        "restarts": (1_500, 1_000),
        "sizes": ((3, 0.05), (4, 0.65), (5, 0.22), (6, 0.08)),
        "shard_examples": 2048,
        "num_chains": 512,
        "num_shards": 2,  # A chain is learned from twice: it costs more than its updates.
        "rows": 256,
        "strategy": "greedy",  # By its rules chains are written; or greedy_no_repeats.
        "max_depth": 20,
        "temperature": 0.5,
        "return_weight": 0.2,  # At 1, chains go back before they have tried anything.
        "keep_share": 0.0,
        "layout": {"num_rows": 10, "row_tokens": 256, "num_soft": 8},
        "optimizer": _muon(
            learning_rate=3e-3, adam_learning_rate=6e-4, warmup_steps=100, decay_share=0.6
        ),
    }


def _search_phase() -> dict:
    return {
        "num_steps": 0,  # Search-and-learn steps behind the supervised ones.
        "strategy": "gumbel",
        "num_problems": 64,
        "sizes": ((4, 1.0),),
        "step": {"batch_rows": 256, "num_updates": 2, "replay_rows": 8192},
        "budget_tokens": 1024,
        "lora_rank": 0,  # Adapters of the policy are learned; 0: all of it.
        "lora_alpha": 16.0,
        "loss": {"kl_coef": 0.0, "kl_estimator": "exact"},  # And what train.loss says.
        "collect": {
            "num_paths": 4,
            "row_tokens": 64,
            "improvement": "completed_q",
            "temperature": 1.0,
            "value_scale": 1.0,
            "visit_offset": 50.0,
            "min_visits": 2.0,
            "value_rule": "max",
            "discount": 1.0,
            "path_rule": "none",  # Or monte_carlo, n_step, td_lambda: values by the path alone.
            "path_steps": 1,
            "path_trace": 0.95,
            "policy_weight": "none",  # Or advantage: exp(A / advantage_scale).
            "advantage_scale": 1.0,
            "policy_nodes": "all",  # Or finished, or proven: those above such ends.
        },
        "optimizer": _muon(
            learning_rate=2e-3,
            adam_learning_rate=3e-4,
            warmup_steps=10,
            decay_share=0.2,
            final_share=0.1,
        ),
    }


def _shorten_chains(config: ConfigDict, max_depth: int) -> None:
    for part in config.values():
        if isinstance(part, ConfigDict) and "max_refused" in part:
            part.max_depth = max_depth


def _make_scarce(config: ConfigDict) -> None:
    config.budget_tokens = 1024
    _shorten_chains(config, 12)
    # Its figures in docs/log.md were made with these, and with products in float32.
    config.evaluator = "value_head"
    config.gumbel.fit_budget = False
    config.best_first.update({"prior_weight": 0.0, "num_nodes": 257, "merge_states": False})
    config.best_first.sampling.update({"method": "stochastic_beam", "min_ratio": 0.0})
    train = config.train
    train.loss.matmul_dtype = "float32"
    train.num_steps = 600
    train.state_value.num_steps = 0
    train.log_steps = 2
    train.network.update({"num_layers": 4, "model_dim": 128, "num_heads": 4, "ffn_dim": 352})
    train.data.update({"num_shards": 1, "shard_examples": 4096, "sizes": ((4, 1.0),)})
    train.data.update({"opening_share": 0.0, "wrong_share": 0.3, "max_wrong": 3})
    train.data.update({"state_share": 0.0, "line_share": 0.0})
    train.value_head = "sigmoid"
    train.loss.update({"value_coef": 0.25, "goal_coef": 0.0})
    train.walks.update({"num_steps": 0, "restarts": ()})
    # PUCT counts visits, so that values are learned from searches that found nothing too.
    train.search.update({"strategy": "puct", "num_steps": 8})
    # No tree of four numbers is longer. Where nothing is proven values are learned, but no moves.
    train.search.collect.update({"row_tokens": 40, "policy_nodes": "proven"})
    train.search.step.update({"batch_rows": 128, "num_updates": 4})
    train.search.optimizer.update({"learning_rate": 1e-3, "adam_learning_rate": 2e-4})


def _shrink(config: ConfigDict) -> None:
    config.model = "random:tiny-llama"
    config.batch_size = 4
    config.budget_tokens = 64
    config.max_depth = 3
    _shorten_chains(config, 3)
    config.best_of_n.num_chains = 2
    several = ("best_first", "puct", "uct", "td_mcts", "beam", "gumbel")
    for name in (*several, "best_first_controlled"):
        config[name].update({"num_nodes": 17, "num_children": 2})
    for name in ("best_first_widening", "best_first_widening_controlled"):
        config[name].update({"num_nodes": 17, "num_children": 1})
    # A random network's tokens do not spell a task's lines.
    for name in ("greedy_controlled", *LOOK_AHEAD):
        config[name].sampling.update({"legal_only": False, "outcome_weight": 0.0})
    # Nor do its likeliest lines follow; where they are drawn others come.
    config.best_first.sampling.update({"method": "stochastic_beam", "min_ratio": 0.0})
    for name in LOOK_AHEAD:
        config[name].evaluator = config.evaluator
    config.beam.beam_width = 2
    config.gumbel.update({"num_simulations": 4, "num_lanes": 2, "max_considered": 2})
    train = config.train
    train.num_steps = 6
    train.state_value.num_steps = 4
    train.state_value.data.num_states = 32
    train.state_value.network.update(
        {"num_layers": 1, "model_dim": 32, "num_heads": 2, "ffn_dim": 48, "num_numbers": 1024}
    )
    train.state_value.optimizer.warmup_steps = 2
    train.state_value.asked.update({"num_steps": 2, "num_goals": 4})
    train.state_value.asked.optimizer.warmup_steps = 1
    train.network.update({"num_layers": 2, "model_dim": 32, "num_heads": 2, "ffn_dim": 48})
    train.data.update({"sizes": ((3, 0.5), (4, 0.5)), "shard_examples": 64})
    train.layout.num_rows = 8
    # Every head and every kind of data, as a run in seconds may as well go through all of them.
    train.value_head = "goals"
    train.loss.goal_coef = 3.0
    train.data.state_share = 0.8
    train.data.try_share = 0.3
    train.optimizer.warmup_steps = 2
    train.log_steps = 2
    train.checkpoint_steps = 2
    train.eval_steps = 4
    train.eval_problems = 4
    train.walks.update({"num_steps": 2, "restarts": (1,), "rows": 8, "max_depth": 3})
    train.walks.update({"shard_examples": 24, "num_chains": 8, "sizes": ((3, 0.5), (4, 0.5))})
    train.walks.layout.num_rows = 8
    train.walks.optimizer.warmup_steps = 1
    # Rounds of one width: fewer programs to compile than Gumbel's.
    train.search.update({"strategy": "best_first", "num_steps": 2})
    train.search.update({"num_problems": 4, "budget_tokens": 64})
    train.search.step.update({"batch_rows": 8, "num_updates": 1, "replay_rows": 64})
    train.search.optimizer.update({"name": "adamw", "warmup_steps": 1})
