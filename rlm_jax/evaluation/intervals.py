"""How far an accuracy can be trusted."""

import math

_Z_95 = 1.959963984540054


def wilson_interval(num_right: int, num_all: int, z: float = _Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927), 95% by default; (0, 1) of nothing.

    Raises:
      ValueError: not 0 <= num_right <= num_all.
    """
    if not 0 <= num_right <= num_all:
        raise ValueError(f"{num_right} right of {num_all}")
    if num_all == 0:
        return 0.0, 1.0
    share = num_right / num_all
    centre = share + z * z / (2 * num_all)
    spread = z * math.sqrt(share * (1 - share) / num_all + z * z / (4 * num_all * num_all))
    scale = 1 + z * z / num_all
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
