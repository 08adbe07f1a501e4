"""Lets runs that were given up be tried again, by the launchers that are at work or by the next.

    python -m launch.retry --folder=runs/isoflop-cpu --run=NAME

Says why each was given up, with the last lines of its log.
"""

import json
from pathlib import Path

from absl import flags

from launch import status, sweep
from llm_jax import command_line
from llm_jax.config import UserError


def retry(folder: Path, only: str | None = None) -> list[str]:
    """Forgets why runs were given up, all or the one named `only`; what was known of them, as lines.

    Raises UserError where no sweep is, or `only` names none that was given up.
    """
    failed = [row.label for row in status.rows(folder) if row.state == "failed"]
    if only and only not in failed:
        raise UserError(
            f"--run={only}: not among those that were given up: {', '.join(failed) or 'none was'}"
        )
    lines = []
    for run in json.loads((folder / "plan.json").read_text())["runs"]:
        if run["label"] in ([only] if only else failed):
            why = sweep.failure(folder / run["identity"])
            lines += [f"{run['label']}: {why['reason']}", *(f"    {line}" for line in why["log"])]
            sweep.forget_failure(folder / run["identity"])
    return lines


def main() -> None:
    lines = retry(status.named(), flags.FLAGS.run)
    print(*lines or ["no run was given up"], sep="\n")
    if lines:
        print("to be tried again: by the launcher that is at work, or launch again")


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "the folder of a sweep")
    flags.DEFINE_string("run", None, "only this one, by its name in `launch.status`")
    command_line.run_main(main)
