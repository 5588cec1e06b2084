"""Records of trees written by hand."""

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns, make_record


def make_tree_record(steps, root="?", values=None, **fields):
    """A record of a root and of steps (parent, text, terminal, alive); a letter is a token.

    Args:
      values: columns of all nodes' values by name; None: the model's, all 0.
      fields: of the record, in place of those here.
    """
    depth = [0]
    for parent, *_ in steps:
        depth.append(depth[parent] + 1)
    texts = [root, *(text for _, text, *_ in steps)]
    zeros = [0] * len(texts)
    nodes = NodeColumns(
        parents=[[], *([parent] for parent, *_ in steps)],
        op=["root"] + ["generate"] * len(steps),
        owner=[-1] * len(texts),
        depth=depth,
        text=texts,
        tokens=[list(text.encode()) for text in texts],
        logprob=zeros,
        visits=zeros,
        value={"model": zeros} if values is None else values,
        prior=zeros,
        reward=zeros,
        terminal=[False, *(terminal for _, _, terminal, _ in steps)],
        alive=[True, *(alive for *_, alive in steps)],
        budget=zeros,
    )
    record = {
        "id": "p",
        "question": "?",
        "answer": None,
        "correct": True,
        "strategy": "best_of_n",
        "config": {},
        "seed": 0,
        "policy_version": "x",
        "value_version": None,
        "budget": dict.fromkeys(BUDGET_FIELDS, 0),
        "seconds": 0.0,
        "chosen": [],
    }
    return make_record(nodes=nodes, **(record | fields))
