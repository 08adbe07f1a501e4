"""The campaign of `make faults`, shorter: kills at random moments lose nothing and change nothing."""

import os
import random
import subprocess
import time
import uuid

import faults
import pytest

from llm_jax.records import Record


@pytest.fixture(autouse=True)
def one_compilation_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(faults.ROOT / ".cache" / "xla"))


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_no_run_and_change_no_result(tmp_path):
    killed, sweeps = faults.campaign(10, tmp_path)
    assert sum(killed.values()) == 10 and sweeps >= 1


@pytest.mark.slow
def test_kills_change_no_result_of_a_sweep_in_a_bucket_from_that_on_a_disk(bucket, tmp_path):
    killed, sweeps = faults.campaign(3, tmp_path, seed=1, bucket=f"{bucket}/{uuid.uuid4().hex}")
    assert sum(killed.values()) == 3 and sweeps >= 1


def test_the_campaign_sees_a_launcher_that_is_refused_though_another_one_goes_on(tmp_path, monkeypatch):
    codes = iter((2, 0))
    refused = lambda *_, **__: subprocess.Popen(["sh", "-c", f"exit {next(codes)}"])  # noqa: E731
    monkeypatch.setattr(faults, "launch", refused)
    with pytest.raises(AssertionError, match="a launcher was refused"):
        faults.disturbed(tmp_path / "sweep", tmp_path, random.Random(0), 0, "--pack=off", together=2)


def test_the_campaign_sees_an_owner_that_writes_on_after_the_next_one_has_claimed_its_run(tmp_path):
    for start in range(2):
        with Record(tmp_path, tensorboard=False) as record:
            record.start({"identity": "one"}, {})
            record.resume_at(start)
            record.log(start + 1, {"loss": 1.0})
    faults.alone_at_it(tmp_path)
    late = time.time() + 1
    os.utime(tmp_path / "metrics" / "00000.jsonl", (late, late))
    with pytest.raises(AssertionError, match="had two owners at once"):
        faults.alone_at_it(tmp_path)


def test_the_campaign_sees_an_owner_that_begins_anew_where_a_checkpoint_stood(tmp_path):
    for start, stop in ((0, 10), (6, 8), (8, 12), (3, 4)):
        with Record(tmp_path, tensorboard=False) as record:
            record.start({"identity": "one"}, {})
            record.resume_at(start)
            for step in range(start, stop):
                record.log(step + 1, {"loss": 1.0})
        again = {0: 0, 6: 4, 8: 4, 3: 9}[start]
        assert faults.trained_again(tmp_path) == again
