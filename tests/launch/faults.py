"""A campaign of kills at random moments, over sweeps with trunks, branches and packs.

    python tests/launch/faults.py --kills=100
    python tests/launch/faults.py --kills=100 --bucket     (of an emulator; undisturbed, they are on a disk)

Workers and launchers get SIGKILL while they start, train, save and end; the same command continues. In every
other pair of sweeps two launchers work at once. Then every run must have ended once, have had one owner at a
time, and have, bit for bit, the losses of the same run in a sweep that nobody disturbed. In packs, where a
kill changes who is computed with whom, losses are equal to 1e-5. Prints what was killed, and exits with 1 at
the first difference.

One owner at a time: between a claim's first row and its last one, and between a checkpoint's first file and
its manifest, no other claim was made. None trained twice: an owner goes on at most two saves before the last
row of the owner before it (a kill may cut one of them), and none begins after the result.
"""

import argparse
import collections
import contextlib
import dataclasses
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
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from emulator import emulated  # noqa: E402

from llm_jax import buckets, claims, config, experiment_file, files, records  # noqa: E402
from llm_jax.schedules import WSD  # noqa: E402

bits, _ = experiment_file.load_experiment(str(HERE / "bits.py"))
SCALES = {"slow": 0.02}
STEPS, SEEDS, SAVED_EVERY = 120, 3, 3
MOST_KILLS, LAUNCHES = 20, 200  # of a sweep


def get_config(scale):
    """Saves every few steps, so that kills hit saves too."""
    base = config.replace(bits.get_config("small"), "data.seconds", SCALES[scale])
    base = config.replace(base, "execution.checkpoint.every_steps", SAVED_EVERY)
    return config.replace(base, "optimizer.schedule", WSD(warmup_steps=10))


def sweep(base):
    return [
        dataclasses.replace(base, seed=seed, tokens=16 * steps, name=f"seed-{seed}-{steps}")
        for seed in range(SEEDS)
        for steps in (STEPS, STEPS // 2)
    ]


def launch(folder, logs, packing, workers=2):
    command = [sys.executable, "-m", "launch.local", f"--config={__file__}", f"--folder={folder}", packing]
    with (logs / f"{folder.name}.txt").open("a") as log:
        return subprocess.Popen([*command, f"--workers={workers}"], cwd=ROOT, stdout=log, stderr=log)


def inside(folder):
    """All files below a folder."""
    if files.in_bucket(folder):
        return [folder / name for name in folder.objects()]
    return [path for path in folder.rglob("*") if path.is_file()]


def written(path):
    """When a file was, in seconds since 1970."""
    if files.in_bucket(path):
        return buckets._store().info(str(path))["mtime"].timestamp()
    return path.stat().st_mtime


def children(pid):
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return found


def doing(folder, pid):
    """What a worker is at, by the files of its run."""
    for place in files.folders(folder):
        owner, parts = claims.owner(place), sorted((place / "metrics").glob("*.jsonl"))
        if owner.get("pid") == pid and "ended" not in owner:
            if owner.get("from") is None or not parts or len(parts[-1].read_bytes().splitlines()) < 2:
                return "starting"
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                for save in (place / "checkpoints").glob("[0-9]*"):
                    latest = max(map(written, inside(save)), default=0.0)
                    own = latest > owner["begun"]  # and not left by who was killed before
                    if own and not save.with_suffix(".json").exists():
                        return "saving"
            return "training"
    return "between runs"


def kill(folder, launchers, rng, whom):
    """Kills a launcher or one of their workers, any or one that is at `whom`; what it was at, or None."""
    if whom == "launcher":
        os.kill(rng.choice(launchers).pid, signal.SIGKILL)
        return whom
    wanted = {"worker": None, "training": ("training", "saving")}.get(whom, (whom,))
    workers = [pid for one in launchers for pid in children(one.pid) if claims._born(pid)]
    at = {pid: what for pid in workers if (what := doing(folder, pid)) in (wanted or [what])}
    if not at:
        return None
    pid = rng.choice(list(at))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # what it is at now it is at when it dies
        at[pid] = doing(folder, pid)
        right = wanted is None or at[pid] in wanted
        os.kill(pid, signal.SIGKILL if right else signal.SIGCONT)
        return f"worker, {at[pid]}" if right else None


def disturbed(folder, logs, rng, kills, packing, together):
    """Launches until all is complete, with so many `kills` on the way; what was killed.

    Raises AssertionError where a launcher is refused, which none should be.
    together: how many launchers work at once. Most of a worker's time is its start, and saves are short, so
    half of the kills wait for one that trains or one that saves.
    """
    killed = collections.Counter()
    for _ in range(LAUNCHES):
        launchers = [launch(folder, logs, packing, workers=2 // together) for _ in range(together)]
        whom = ""
        while sum(killed.values()) < kills:
            if not (living := [one for one in launchers if one.poll() is None]):
                break
            if not whom:
                whom = rng.choice(["launcher", "worker", "training", "saving"])
                time.sleep(rng.uniform(0.1, 2.0))
            if what := kill(folder, living, rng, whom):
                killed[what] += 1
                whom = ""
            else:
                time.sleep(0.01)
        codes = [one.wait() for one in launchers]
        assert 2 not in codes, f"a launcher was refused: see {logs / folder.name}.txt"
        if 0 in codes:
            return killed
    raise AssertionError(f"{folder} isn't complete after {LAUNCHES} launches")


def alone_at_it(run):
    """Raises AssertionError if the run had two owners at once."""
    made = [json.loads(path.read_text())["begun"] for path in (run / "claims").glob("[0-9]????")]
    spans, last = [], 0.0
    for part in sorted((run / "metrics").glob("*.jsonl")):
        head, whole, _ = part.read_text().partition("\n")
        if whole:  # a start's first part has its time, the others follow it
            first, last = json.loads(head).get("time", last), written(part)
            spans.append((first, last))
    for manifest in (run / "checkpoints").glob("[0-9]*.json"):
        spans.append((min(map(written, inside(manifest.with_suffix("")))), written(manifest)))
    for first, last in spans:
        others = [begun for begun in made if first < begun <= last]
        assert not others, f"{run} had two owners at once, at {others} since 1970"


def trained_again(run):
    """The most steps that an owner had logged and the next one trained once more."""
    last = most = 0
    for line in records._lines(run):
        if "resume_at" in line:
            last, most = line["resume_at"], max(most, last - line["resume_at"])
        elif "step" in line:
            last = line["step"]
    return most


def check(folder, alone, tolerance):
    """Raises AssertionError for a run that is lost, was trained twice or by two, or has another result."""
    for place in sorted(path.parent for path in alone.glob("*/config.json")):
        run = folder / place.name
        found, wanted = records.load_run(run)["result"], records.load_run(place)["result"]
        assert found is not None and found["status"] == "done", f"{run} is lost"
        ours, theirs = (records.metrics(one)["loss"].to_numpy() for one in (run, place))
        assert len(ours) == len(theirs) and abs(ours - theirs).max() <= tolerance, f"{run}: another result"
        assert abs(found["train_loss"] - wanted["train_loss"]) <= tolerance, f"{run}: another result"
        alone_at_it(run)
        again, ended = trained_again(run), written(run / "result.json")
        assert again <= 2 * SAVED_EVERY, f"{run} was trained twice: {again} steps"
        assert all(start["time"] <= ended for start in records.starts(run)), f"{run} was trained twice"


def campaign(kills, folder, seed=0, bucket=None):
    """Sweeps until `kills` processes have been killed; how many of what, and in how many sweeps.

    bucket: where disturbed sweeps are, if not in `folder`, in which the others and all logs are.
    """
    rng, total, sweeps, alone = random.Random(seed), collections.Counter(), 0, set()
    ways = [(*pack, together) for together in (1, 2) for pack in (("--pack=off", 0.0), ("--pack=4", 1e-5))]
    folder.mkdir(exist_ok=True)
    while (left := kills - sum(total.values())) > 0:
        packing, tolerance, together = ways[sweeps % len(ways)]
        place, undisturbed = files.path(bucket or folder, f"sweep-{sweeps}"), folder / f"alone{packing}"
        if packing not in alone:
            assert launch(undisturbed, folder, packing).wait() == 0, f"see {undisturbed}.txt"
            alone.add(packing)
        total += disturbed(place, folder, rng, min(left, MOST_KILLS), packing, together)
        check(place, undisturbed, tolerance)
        sweeps += 1
        print(f"{sum(total.values())} kills in {sweeps} sweeps: {dict(sorted(total.items()))}", flush=True)
    return total, sweeps


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true")
    given = parser.parse_args()
    somewhere = emulated() if given.bucket else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, somewhere as bucket:
        total, sweeps = campaign(given.kills, pathlib.Path(folder), given.seed, bucket)
    print(f"{2 * SEEDS * sweeps} runs: none lost, none trained twice, all as undisturbed")
