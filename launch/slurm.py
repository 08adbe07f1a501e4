"""Runs an experiment on a Slurm cluster: arrays of jobs that wait for each other, and nothing that must stay.

    python -m launch.slurm --config=experiments/isoflop.py --workers=16 --folder=/shared/isoflop \\
        --sbatch="--partition=gpu --gres=gpu:8 --time=4:00:00"

One array trains what needs no trunk. Branches come in an array of their own, which begins when their trunks'
has ended. A last job finds out what is missing, makes the forecasts, trains the hold-outs and writes the
report. A job that is preempted or out of time saves its state and is queued again; one that is cancelled only
saves it. The folder is on a disk that all nodes see; what jobs print is in its slurm/.
"""

import collections
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from launch import engine, packs, status
from launch.jobs import enlist
from launch.pool import TRIES
from launch.sweep import Plan, Planned
from llm_jax import config
from llm_jax.config import UserError
from llm_jax.values import AGAIN

SECONDS_BETWEEN_LOOKS = 5.0

# The shell gets the signals of its job, and hands on what asks to save. USR1 says that its time is almost up:
# it is queued again. TERM is scancel's, or a preemption's, after which Slurm itself queues what it should.
# What was killed, for its memory it may be, comes again a few times: so a run that kills its place is found.
SCRIPT = """#!/bin/bash
cd {here}
export PYTHONPATH={here}${{PYTHONPATH:+:$PYTHONPATH}}
asked= again= child=
save() {{ asked=yes; [ -z "$child" ] || kill -TERM "$child"; }}
trap 'save; again=143' USR1
trap save TERM
{command} &
child=$!
[ -z "$asked" ] || kill -TERM "$child"
wait "$child"; code=$?
while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
[ "$code" -ne 137 ] || [ -n "$asked" ] || [ "${{SLURM_RESTART_COUNT:-0}}" -ge {tries} ] || again=137
[ -e {stop} ] || case $code in "$again"|{again}) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
"""


class Slurm:
    """The engine; a job is an array of places, all with one number."""

    name, python = "slurm", sys.executable

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self._folder, self._options = folder.absolute(), list(options)

    def start(self, command: Sequence[str], places: int = 1, after: Sequence[str] = ()) -> str:
        """An array of `places` that begins when the jobs `after` have ended, however that was."""
        logs = self._folder / "slurm"
        logs.mkdir(parents=True, exist_ok=True)
        return run(self.line(places, after), self.script(command)).partition(";")[0].strip()

    def line(self, places: int, after: Sequence[str] = ()) -> list[str]:
        """The sbatch command."""
        waits = [f"--dependency=afterany:{':'.join(after)}"] if after else []
        return [
            *("sbatch", "--parsable", f"--job-name={self._folder.name}", f"--array=0-{places - 1}", *waits),
            *("--requeue", "--open-mode=append", "--signal=B:USR1@120"),
            *(f"--output={self._folder}/slurm/%A_%a.txt", *self._options),
        ]

    def script(self, command: Sequence[str]) -> str:
        return SCRIPT.format(
            here=shlex.quote(str(Path.cwd())),
            command=shlex.join(command),
            stop=shlex.quote(str(self._folder / engine.STOP)),
            again=AGAIN,
            tries=TRIES,
        )

    def living(self, jobs: Iterable[str]) -> set[str]:
        return set(jobs) & set(run(["squeue", "--me", "--noheader", "--format=%F"]).split())

    def stop(self, jobs: Iterable[str]) -> None:
        """Those that wait; those that run see the file that says stop."""
        if jobs := sorted(self.living(jobs)):
            run(["scancel", "--state=PENDING", *jobs])

    def tail(self, job: str) -> str:
        logs = sorted((self._folder / "slurm").glob(f"{job}_*.txt"))
        return logs[-1].read_text(errors="replace")[-2000:] if logs else ""


def run(command: Sequence[str], text: str = "") -> str:
    """What a command of Slurm's prints; raises UserError with what it says if it refuses."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"no {command[0]} here: start this where Slurm's commands are") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def waves(plan: Plan, width: int | None, places: int) -> list[int]:
    """How many places each array has: that of the runs which need no trunk, that of their branches, ..."""
    missing: dict[int, list[Planned]] = collections.defaultdict(list)
    for item in plan.sweep:
        if not item.complete:
            missing[_depth(item)].append(item)
    return [min(places, len(packs.packed(missing[depth], places, width))) for depth in sorted(missing)]


def _depth(item: Planned) -> int:
    return 0 if item.trunk is None or item.ready else 1 + _depth(item.trunk)


def give_back(jobs: Sequence[str]) -> list[str]:
    """For `launch.stop`: cancels what waits."""
    Slurm(Path()).stop(jobs)
    return list(jobs)


def main() -> int:
    experiment = config.chosen()
    folder = engine.folder_of(experiment)
    plan = engine.planned(experiment, folder)
    if not flags.FLAGS.dry_run:
        for run in plan.runs:
            run.forget_failure()
    slurm, jobs = Slurm(folder, shlex.split(flags.FLAGS.sbatch)), []
    arrays = [(n, True) for n in waves(plan, packs.width_of(flags.FLAGS.pack), flags.FLAGS.workers)]
    for places, joins in [*arrays, (1, False)]:
        command = engine.command_of(experiment, folder, slurm.python, joins)
        if flags.FLAGS.dry_run:
            after = [f"JOB{len(jobs)}"] if jobs else []
            print(shlex.join(slurm.line(places, after)), slurm.script(command), sep="\n")
            jobs.append(f"JOB{len(jobs) + 1}")
        else:
            jobs.append(slurm.start(command, places, jobs[-1:]))
            enlist(folder, slurm.name, jobs[-1], flags.FLAGS.dollars_per_hour)
    if flags.FLAGS.dry_run:
        return 0
    print(f"jobs {' '.join(jobs)}; python -m launch.status --folder={folder}", flush=True)
    return wait(slurm, folder, jobs) if flags.FLAGS.wait else 0


def wait(slurm: Slurm, folder: Path, jobs: Sequence[str]) -> int:
    """Returns when all jobs have ended: 0 if every run is complete, else 1 and what the last job printed."""
    while slurm.living(jobs):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    found = status.rows(folder)
    print(status.table(found))
    if all(row.complete for row in found):
        return 0
    print(slurm.tail(jobs[-1]))
    return 1


if __name__ == "__main__":
    engine.define_flags("jobs of the largest array")
    flags.DEFINE_bool("wait", False, "stay until all jobs have ended")
    flags.DEFINE_string("sbatch", "", "further options for sbatch, such as --partition and --time")
    config.run_main(main)
