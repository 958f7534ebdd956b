from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretune.data.packing import best_fit


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Space left in each sequence: longest first, each piece into the fullest sequence that has room for it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 40), max_size=150), st.integers(0, 30))
def test_packing_many_at_once_is_the_textbook_algorithm(lengths: list[int], more: int) -> None:
    capacity = max(lengths, default=1) + more
    rows = best_fit(np.array(lengths, dtype=np.int64), capacity)
    loads = np.bincount(rows, weights=np.array(lengths, dtype=np.int64))
    assert sorted((capacity - loads).astype(int).tolist()) == textbook(lengths, capacity)
    firsts = [int(np.flatnonzero(rows == row)[0]) for row in range(len(loads))]
    assert firsts == sorted(firsts)  # sequences roughly keep the order of the documents
