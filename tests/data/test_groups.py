"""Groups of linked rows are the connected components that scipy finds, numbered alike."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from poise.data import evaluation_sets
from poise.data.groups import components
from poise.functional import statistics


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_those_of_scipy(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    count, links = drawn
    one, two = np.array(links, dtype=int).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(links)), (one, two)), (count, count))
    assert components(links, count).tolist() == connected_components(graph, directed=False)[1].tolist()


def test_a_long_chain_is_one_group() -> None:
    assert set(components(((i, i + 1) for i in reversed(range(9_999))), 10_000)) == {0}


def test_too_few_groups_are_the_same_number_where_they_are_read_and_where_they_are_drawn() -> None:
    assert evaluation_sets.LEAST_UNITS == statistics.FEW
