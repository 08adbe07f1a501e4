"""Intervals hold the truth about as often as they say; `make coverage` says it of 200 sets."""

import pytest
from interval_coverage import measure


@pytest.fixture(scope="module")
def rows():
    return list(measure(40, refits=150))


@pytest.mark.slow
def test_every_kind_of_interval_covers_about_as_often_as_it_says(rows):
    for row in rows:
        assert all(0.8 <= share <= 0.98 for share in row.shares.values()), str(row)
