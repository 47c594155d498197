"""Groups of rows that are not independent. NumPy in, NumPy out; without scipy, which bad input need not wait for."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int
from numpy import ndarray


def components(links: Iterable[tuple[int, int]], count: int) -> Int[ndarray, " nodes"]:
    """The number of each node's connected component, in the order of their first nodes. links: pairs of nodes.

    >>> components([(0, 3), (3, 2)], 5).tolist()
    [0, 1, 0, 0, 2]
    """
    above = list(range(count))

    def first(node: int) -> int:
        while above[node] != node:
            above[node] = node = above[above[node]]
        return node

    for one, other in links:
        low, high = sorted((first(one), first(other)))
        above[high] = low
    return np.unique(np.array([first(node) for node in range(count)], dtype=int), return_inverse=True)[1]
