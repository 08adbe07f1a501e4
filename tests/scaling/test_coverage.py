"""Intervals hold the truth about as often as they say; `make coverage` says it of 200 sets."""

import pytest
from interval_coverage import KINDS, measure

OFTEN = ("huber", "local")  # the defaults, under every condition


@pytest.fixture(scope="module")
def rows():
    others = [kind for kind in KINDS if kind not in OFTEN]
    usual = measure(40, refits=150, kinds=OFTEN)
    return [*usual, *measure(40, refits=150, kinds=others, conditions=[(0.01, False)])]


@pytest.mark.slow
def test_intervals_cover_about_as_often_as_they_say(rows):
    assert len(rows) == 4 * len(OFTEN) + len(KINDS) - len(OFTEN)
    for row in rows:
        assert all(0.8 <= share <= 0.98 for share in row.judged.values()), str(row)
