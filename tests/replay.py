"""A plain-Python reader of the operator log: what its events alone make of a structure."""


def replay(events, num_nodes=1):
    """Living nodes and parents, after (operator, nodes) pairs on a structure of `num_nodes` roots.

    Returns:
      A flag per node, and its list of parents.
    """
    alive, parents = [True] * num_nodes, [[] for _ in range(num_nodes)]
    for operator, (node, *others) in events:
        if operator in ("generate", "refine", "aggregate", "restructure"):
            assert others == list(range(len(alive), len(alive) + len(others)))
            assert alive[node]
            alive += [True] * len(others)
            parents += [[node] for _ in others]
        elif operator in ("discard", "prune"):
            for gone in (node, *others):
                assert alive[gone], f"node {gone} goes twice"
                alive[gone] = False
        elif operator == "merge":
            (twin,) = others
            assert alive[node]
            assert alive[twin]
            alive[node] = False
        elif operator == "link":
            parents[node] += others
        elif operator == "keep_subtree":
            new = {old: place for place, old in enumerate(others)}
            assert others[0] == node
            alive = [alive[old] for old in others]
            parents = [[new[p] for p in parents[old] if p in new] for old in others]
        elif operator == "backpropagate":
            for below, above in zip((node, *others), others, strict=False):
                assert parents[below][0] == above
        else:
            assert operator in ("select", "backtrack", "evaluate"), operator
            assert alive[node]
    return alive, parents
