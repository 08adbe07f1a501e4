"""Published points that the tests of fits share."""

import pandas as pd
import pytest


@pytest.fixture(scope="session")
def chinchilla_points(reference_data) -> pd.DataFrame:
    """Epoch's 245 points; see SOURCE.md beside them."""
    path = reference_data / "scaling" / "epoch_chinchilla" / "chinchilla_points.csv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return pd.read_csv(path)
