"""The campaign of `make faults`, shorter: kills at random moments lose nothing and change nothing."""

import faults
import pytest


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_no_run_and_change_no_result(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(faults.ROOT / ".cache" / "xla"))
    killed, sweeps = faults.campaign(10, tmp_path)
    assert sum(killed.values()) == 10 and sweeps >= 1
