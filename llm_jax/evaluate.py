"""Evaluating a model on tasks.

python -m llm_jax.evaluate --model=DIR|FILE.gguf|RUN --tasks=arc_easy,gsm8k,mine.json --limit=100
python -m llm_jax.evaluate --model=… --tasks=arc_easy --chat --few_shot=5 --out=runs/mine

--tasks=help lists the published tasks; one's own is a .json file (llm_jax/evaluation/tasks.py says how it is
written). What was answered is kept, so the same command again continues.
"""

import json
import math
import os
import sys
from collections.abc import Sequence

from absl import flags

from llm_jax import command_line, files
from llm_jax.config import UserError
from llm_jax.evaluation import probes, standard
from llm_jax.evaluation.runner import Evaluator, content
from llm_jax.evaluation.scores import Outcome, evaluate
from llm_jax.evaluation.tasks import Format
from llm_jax.inference import options
from llm_jax.process import prepare_xla
from llm_jax.scaling.page import Table


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each metric of each task; no standard error where one item, or one group, stands alone."""
    rows = []
    for outcome in outcomes:
        for name, metric in outcome.metrics().items():
            error = f"{metric.standard_error:.4f}" if math.isfinite(metric.standard_error) else ""
            where = [outcome.name, str(outcome.form), name]
            rows.append([*where, f"{metric.value:.4f}", error, f"{metric.count:,}"])
    return Table(["task", "format", "metric", "value", "standard error", "items"], rows, texts=(0, 1, 2))


def main() -> None:
    f = flags.FLAGS
    if f.tasks == ["help"]:
        for name, task in standard.TASKS.items():
            print(f"{name:<20} {task.kind:<16} {task.file}")
        for name in (*probes.PROBES, probes.SELF):
            print(f"{name:<20} {'probe':<16} made by code; {' or '.join(probes.ways(name)[1:])}")
        return
    prepare_xla(deterministic=False)
    if not f.model or not f.tasks:
        raise UserError("--model and --tasks are needed; --tasks=help lists the published ones")
    if f.few_shot < 0 or (f.limit is not None and f.limit < 1) or f.slots < 1:
        raise UserError("--few_shot is at least 0, --limit and --slots are at least 1")
    if f.out and os.path.isfile(os.path.expanduser(f.out)):
        raise UserError(f"--out={f.out} is a file: name a folder")
    tasks = standard.tasks(f.tasks, standard.folder(f.data), f.few_shot, f.limit)
    form = Format(f.chat, f.few_shot)
    opened = options.opened(f.model)
    if f.out:
        out = files.path(os.path.expanduser(f.out))
        out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(opened, keep=f.keep, slots=f.slots)
    try:
        outcomes = [evaluate(evaluator, *task, form, f.limit) for task in tasks]
    except KeyboardInterrupt:
        print("stopped" + "; the same command continues" * f.keep, file=sys.stderr)
        raise SystemExit(130) from None
    print(table(outcomes))
    for outcome in outcomes:
        print(*(f"{line}\n" for line in outcome.left_out(opened.context)), sep="", end="")
    if f.out:
        for outcome in outcomes:
            lines = "".join(f"{json.dumps(files.with_nulls(row))}\n" for row in outcome.rows())
            files.write_atomically(out / f"{outcome.name}.jsonl", lines)
        result = {
            "model": {"name": opened.name, "content": evaluator.content or content(opened)},
            "tasks": {outcome.name: outcome.to_json() for outcome in outcomes},
        }
        files.write_atomically(out / "result.json", json.dumps(files.with_nulls(result), indent=1) + "\n")


if __name__ == "__main__":
    options.define_model()
    flags.DEFINE_list("tasks", [], "published tasks, probes, or .json files; --tasks=help lists them")
    flags.DEFINE_bool("chat", False, "ask in turns: of the model's chat template, or of a transcript")
    flags.DEFINE_integer("few_shot", 0, "how many examples stand before each question")
    flags.DEFINE_integer("limit", None, "a fair sample of so many items of each task")
    flags.DEFINE_string("data", "", "the folder of published task files")
    flags.DEFINE_string("out", None, "a folder for result.json and every item's answers")
    flags.DEFINE_integer("slots", 16, "how many answers are generated at once")
    flags.DEFINE_bool("keep", True, "keep answers in the cache, so that the same command continues")
    command_line.run_main(main)
