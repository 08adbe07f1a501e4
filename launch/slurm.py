"""Runs an experiment on a Slurm cluster: arrays of jobs that wait for each other, and nothing that must stay.

    python -m launch.slurm --config=experiments/isoflop.py --workers=16 --folder=/shared/isoflop \\
        --sbatch="--partition=gpu --gres=gpu:8 --time=4:00:00"

One array trains what needs no trunk. Branches come in an array of their own, which begins when their trunks'
has ended. A last job finds out what is missing, makes the forecasts, trains the hold-outs and writes the
report. With --hosts=4 each job has four nodes, which train one run at a time together. A job that is
preempted or out of time saves its state and is queued again; one that is cancelled only saves it. The folder
is on a disk that all nodes see; what jobs print is in its slurm/.
"""

import collections
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from launch import engine, packs, status, sweep
from launch.jobs import enlist
from launch.pool import TRIES
from launch.sweep import Plan, Planned
from llm_jax import command_line, files
from llm_jax.config import UserError
from llm_jax.distributed import SECRET
from llm_jax.values import AGAIN

SECONDS_BETWEEN_LOOKS = 5.0
RESTARTS = 100  # of a job, whatever for, after which one that ends with AGAIN by itself has ended

# The shell gets the signals of its job, and hands on what asks to save. USR1 says that its time is almost up:
# it is queued again. TERM is scancel's, or a preemption's, after which Slurm itself queues what it should.
# What was killed, for its memory it may be, comes again a few times: so a run that kills its place is found.
# What has lost a node does too, but not for ever, as where nodes lose each other each time.
# On several nodes it is a step: srun would kill it, so scancel asks; of TERM Slurm itself tells its tasks. It
# tells them alone in the grace of a preemption, and takes a job that ends in it for one that has failed.
# One job of an array has the array's own number, which means all of them: each goes by its place there.
# srun tells its tasks the secret by which they know each other: of the job's port anybody may know.
SCRIPT = """#!/bin/bash
cd {here}
export PYTHONPATH={here}${{PYTHONPATH:+:$PYTHONPATH}}
export {secret}=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')
asked= child=
task="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
save() {{ asked=$1; [ -z "$child" ] || {ask}; }}
trap 'save time' USR1
trap '{cancel}' TERM
{command} &
child=$!
[ -z "$asked" ] || {ask}
wait "$child"; code=$?
while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
restarts=${{SLURM_RESTART_COUNT:-0}}
case $asked:$code in
    time:143|time:{again}{preempted}) ;;
    :137) [ "$restarts" -lt {tries} ] ;;
    :{again}) [ "$restarts" -lt {restarts} ] ;;
    *) false ;;
esac && [ ! -e {stop} ] && scontrol requeue "$task"
exit $code
"""


ASK, ASK_ALL = 'kill -TERM "$child"', 'scancel --signal=TERM "$task"'
SRUN = ("srun", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0")


class Slurm:
    """The engine; a job is an array of places, all with one number. hosts: the nodes of each place."""

    name, python = "slurm", sys.executable

    def __init__(self, folder: Path, options: Sequence[str] = (), hosts: int = 1) -> None:
        self._folder, self._options, self._hosts = folder.absolute(), list(options), hosts

    def start(self, command: Sequence[str], places: int = 1, after: Sequence[str] = ()) -> str:
        """An array of `places` that begins when the jobs `after` have ended, however that was."""
        logs = self._folder / "slurm"
        logs.mkdir(parents=True, exist_ok=True)
        return run(self.line(places, after), self.script(command)).partition(";")[0].strip()

    def line(self, places: int, after: Sequence[str] = ()) -> list[str]:
        """The sbatch command."""
        waits = [f"--dependency=afterany:{':'.join(after)}"] if after else []
        nodes = [f"--nodes={self._hosts}", "--ntasks-per-node=1"] if self._hosts > 1 else []
        return [
            *("sbatch", "--parsable", f"--job-name={self._folder.name}", f"--array=0-{places - 1}", *waits),
            *nodes,
            *("--requeue", "--open-mode=append", "--signal=B:USR1@120"),
            *(f"--output={self._folder}/slurm/%A_%a.txt", *self._options),
        ]

    def check(self) -> None:
        """Raises UserError for what Slurm would refuse, or keep waiting for ever; nothing is queued."""
        try:
            run([*self.line(1), "--test-only"], self.script(["true"]))
        except UserError as error:
            if not re.search("busy|down|drained|reserved", str(error)):  # these pass
                raise

    def script(self, command: Sequence[str]) -> str:
        many = self._hosts > 1
        return SCRIPT.format(
            here=shlex.quote(str(Path.cwd())),
            command=shlex.join([*(SRUN if many else ()), *command]),
            ask=ASK_ALL if many else ASK,
            cancel="asked=cancelled" if many else "save cancelled",
            stop=shlex.quote(str(self._folder / engine.STOP)),
            again=AGAIN,
            preempted="|:143" if many else "",
            tries=TRIES,
            restarts=RESTARTS,
            secret=SECRET,
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
        said = done.stderr.strip() or done.stdout.strip()
        if re.search("fatal: .* configuration (source|file)", said):
            raise UserError("no Slurm cluster here: no slurm.conf is found, which SLURM_CONF may name")
        lines = (re.sub(f"^{command[0]}: (error: )?", "", line) for line in said.splitlines())
        raise UserError(f"{command[0]}: {'; '.join(lines)}")
    return done.stdout


def waves(plan: Plan, width: int | None, places: int) -> list[int]:
    """How many places each array has: that of the runs which need no trunk, that of their branches, ..."""
    missing: dict[int, list[Planned]] = collections.defaultdict(list)
    for item in sweep.missing(plan.sweep):
        missing[_depth(item)].append(item)
    return [min(places, len(packs.packed(missing[depth], places, width))) for depth in sorted(missing)]


def _depth(item: Planned) -> int:
    return 0 if item.trunk is None or item.ready else 1 + _depth(item.trunk)


def options(text: str) -> list[str]:
    """Those for sbatch that a user has given; raises UserError for what is the launcher's to say."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"--sbatch={text}: {error}; options as in a shell, --sbatch='--time=4:00:00'"
        ) from None
    for word in words:
        if re.match("--(array|nodes|dependency)|-[aNd]", word):
            raise UserError(f"--sbatch={text}: --workers says how many jobs, --hosts of how many nodes each")
    return words


def give_back(jobs: Sequence[str]) -> list[str]:
    """For `launch.stop`: cancels what waits."""
    Slurm(Path()).stop(jobs)
    return list(jobs)


def main() -> int:
    experiment = command_line.chosen()
    folder = engine.folder_of(experiment)
    engine.refuse_each(flags.FLAGS.hosts)
    if files.in_bucket(folder):
        raise UserError(f"--folder={folder}: Slurm's jobs write on a disk that nodes share; name one there")
    hosts = flags.FLAGS.hosts
    slurm, jobs = Slurm(folder, options(flags.FLAGS.sbatch), hosts), []
    if not flags.FLAGS.dry_run:
        slurm.check()
    plan = engine.planned(experiment, folder)
    if not flags.FLAGS.dry_run:
        files.each(Planned.forget_failure, plan.runs, folder)
    width = packs.width_of(flags.FLAGS.pack) if hosts == 1 else 1
    arrays = [(n, True) for n in waves(plan, width, flags.FLAGS.workers)]
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
    flags.DEFINE_integer("hosts", 1, "nodes of each job, which train one run together", lower_bound=1)
    flags.DEFINE_bool("wait", False, "stay until all jobs have ended")
    flags.DEFINE_string("sbatch", "", "further options for sbatch, such as --partition and --time")
    command_line.run_main(main)
