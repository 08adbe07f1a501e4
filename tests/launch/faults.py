"""A campaign of kills at random moments, over sweeps with trunks, branches and packs.

    python tests/launch/faults.py --kills=100

Workers and launchers get SIGKILL while they start, train, save and end; the same command continues. Then
every run must have ended once, have had one owner at a time, and have, bit for bit, the losses of the same
run in a sweep that nobody disturbed. In packs, where a kill changes who is computed with whom, losses are
equal to 1e-5. Prints what was killed, and exits with 1 at the first difference.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from llm_jax import claims, config, records  # noqa: E402
from llm_jax.schedules import WSD  # noqa: E402

bits, _ = config.load_experiment(str(HERE / "bits.py"))
SCALES = {"slow": 0.02}
STEPS, SEEDS = 120, 3
MOST_KILLS, LAUNCHES = 20, 200  # of a sweep


def get_config(scale):
    """Saves every few steps, so that kills hit saves too."""
    base = config.replace(bits.get_config("small"), "data.seconds", SCALES[scale])
    base = config.replace(base, "execution.checkpoint.every_steps", 3)
    return config.replace(base, "optimizer.schedule", WSD(warmup_steps=10))


def sweep(base):
    return [
        dataclasses.replace(base, seed=seed, tokens=16 * steps, name=f"seed-{seed}-{steps}")
        for seed in range(SEEDS)
        for steps in (STEPS, STEPS // 2)
    ]


def launch(folder, packing):
    command = [sys.executable, "-m", "launch.local", f"--config={__file__}", f"--folder={folder}", packing]
    with (folder.parent / f"{folder.name}.txt").open("a") as log:
        return subprocess.Popen([*command, "--workers=2"], cwd=ROOT, stdout=log, stderr=log)


def children(pid):
    found = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def doing(folder, pid):
    """What a worker is at, by the files of its run."""
    for place in (path.parent for path in folder.glob("*/claims")):
        owner, parts = claims.owner(place), sorted((place / "metrics").glob("*.jsonl"))
        if owner.get("pid") == pid and "ended" not in owner:
            if owner.get("from") is None or not parts or len(parts[-1].read_bytes().splitlines()) < 2:
                return "starting"
            saves = (place / "checkpoints").glob("[0-9]*")
            return "training" if all(path.with_suffix(".json").exists() for path in saves) else "saving"
    return "between runs"


def disturbed(folder, rng, kills, packing):
    """Launches until all is complete, with so many `kills` on the way; what was killed.

    Most of a worker's time is its start, so half of the kills wait for one that trains.
    """
    killed = collections.Counter()
    for _ in range(LAUNCHES):
        launcher, whom = launch(folder, packing), ""
        while launcher.poll() is None and sum(killed.values()) < kills:
            if not whom:
                whom = rng.choice(["launcher", "worker", "training", "training"])
                time.sleep(rng.uniform(0.1, 2.0))
            at = {pid: doing(folder, pid) for pid in children(launcher.pid)}
            pids = [pid for pid, what in at.items() if whom == "worker" or what in ("training", "saving")]
            pid = launcher.pid if whom == "launcher" else rng.choice(pids or [None])
            if pid is None:
                time.sleep(0.05)
            elif launcher.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed["launcher" if pid == launcher.pid else f"worker, {at[pid]}"] += 1
                whom = ""
        if launcher.wait() == 0:
            return killed
    raise AssertionError(f"{folder} isn't complete after {LAUNCHES} launches")


def check(folder, alone, tolerance):
    """Raises AssertionError for a run that is lost, was trained by two at once, or has another result."""
    for place in sorted(path.parent for path in alone.glob("*/config.json")):
        run = folder / place.name
        found, wanted = records.load_run(run)["result"], records.load_run(place)["result"]
        assert found is not None and found["status"] == "done", f"{run} is lost"
        ours, theirs = (records.metrics(one)["loss"].to_numpy() for one in (run, place))
        assert len(ours) == len(theirs) and abs(ours - theirs).max() <= tolerance, f"{run}: another result"
        assert abs(found["train_loss"] - wanted["train_loss"]) <= tolerance, f"{run}: another result"
        numbers = sorted(path for path in (run / "claims").iterdir() if path.suffix == "")
        for before, after in itertools.pairwise(numbers):
            sign = before.with_suffix(".sign")
            last = json.loads(sign.read_text())["time"] if sign.exists() else 0.0
            assert last <= json.loads(after.read_text())["begun"], f"{run} had two owners at once"
        ended = (run / "result.json").stat().st_mtime
        assert all(start["time"] <= ended for start in records.starts(run)), f"{run} was trained twice"


def campaign(kills, folder, seed=0):
    """Sweeps until `kills` processes have been killed; how many of what, and in how many sweeps."""
    rng, total, sweeps, alone = random.Random(seed), collections.Counter(), 0, set()
    ways = [("--pack=off", 0.0), ("--pack=4", 1e-5)]
    folder.mkdir(exist_ok=True)
    while (left := kills - sum(total.values())) > 0:
        packing, tolerance = ways[sweeps % len(ways)]
        place, undisturbed = folder / f"sweep-{sweeps}", folder / f"alone{packing}"
        if packing not in alone:
            assert launch(undisturbed, packing).wait() == 0, f"see {undisturbed}.txt"
            alone.add(packing)
        total += disturbed(place, rng, min(left, MOST_KILLS), packing)
        check(place, undisturbed, tolerance)
        sweeps += 1
        print(f"{sum(total.values())} kills in {sweeps} sweeps: {dict(sorted(total.items()))}", flush=True)
    return total, sweeps


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total, sweeps = campaign(given.kills, pathlib.Path(folder), given.seed)
    print(f"{2 * SEEDS * sweeps} runs: none lost, none trained twice, all as undisturbed")
