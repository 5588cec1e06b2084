"""The difficulty dial that generated tasks share."""


def check_dial(seed: int, num_problems: int, difficulty: float) -> None:
    """Checks the arguments of a task's `generate`.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"difficulty must be in [0, 1], not {difficulty}")
    if seed < 0 or num_problems < 0:
        raise ValueError(f"seed and num_problems must be >= 0, not {seed} and {num_problems}")
