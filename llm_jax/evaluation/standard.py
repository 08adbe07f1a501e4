"""Published tasks by name, on their files as they are passed around, and those of one's own."""

import json
import os
import pathlib
from collections.abc import Sequence

from llm_jax import config as configs
from llm_jax.config import UserError
from llm_jax.evaluation import probes
from llm_jax.evaluation.kinds import Completion, Documents, Generation, MultipleChoice
from llm_jax.evaluation.tasks import Task, sound

_QUERY = {"question": "{query}", "answer": "gold"}
_BBH = {"reader": "big_bench", "within": "examples", "question": "Q: {input}\nA:", "answer": "target"}

# With llm-foundry's files a question is in `query`, the number of the right choice in `gold`.
TASKS: dict[str, Task] = {
    "arc_easy": MultipleChoice("arc_easy.jsonl.xz", question="{query}\nAnswer:", answer="gold"),
    "commonsense_qa": MultipleChoice("commonsense_qa.jsonl.xz", **_QUERY),
    "copa": MultipleChoice("copa.jsonl.xz", **_QUERY),
    "openbook_qa": MultipleChoice("openbook_qa.jsonl.xz", **_QUERY),
    "piqa": MultipleChoice("piqa.jsonl.xz", question="{query}\nAnswer:", answer="gold"),
    "winograd": MultipleChoice(
        "winograd_wsc.jsonl.xz",
        question="",
        choices="context_options",
        answer="gold",
        ending="{continuation}",
    ),
    "truthful_qa": MultipleChoice(
        "TruthfulQA.csv.xz", reader="truthful_qa", question="Q: {question}\nA:", group="category"
    ),
    "boolean_expressions": MultipleChoice("bbh/boolean_expressions.json.xz", fixed=("True", "False"), **_BBH),
    "navigate": MultipleChoice("bbh/navigate.json.xz", fixed=("Yes", "No"), **_BBH),
    "date_understanding": MultipleChoice("bbh/date_understanding.json.xz", **_BBH),
    "lambada": Completion("lambada_openai.jsonl.xz"),
    "simple_arithmetic": Completion("simple_arithmetic_withspaces.jsonl.xz"),
    "jeopardy": Completion("jeopardy_all.jsonl.xz", question="{context}\nAnswer:", group="category"),
    "gsm8k": Generation(
        "gsm8k_test.jsonl.xz",
        reader="gsm8k",
        examples="gsm8k_train.jsonl.xz",
        question="Question: {question}\nAnswer:",
        answer="{result}",
        shown="{answer}",
        check_by="numeric",
        stops=("\n\n", "Question:"),
        max_tokens=320,
    ),
    "svamp": Generation(
        "svamp.jsonl.xz",
        question="Question: {context}\nAnswer:",
        check_by="numeric",
        stops=("\n\n", "Question:"),
        max_tokens=128,
    ),
    "object_counting": Generation(
        "bbh/object_counting.json.xz",
        **_BBH | {"answer": "{target}"},
        check_by="numeric",
        stops=("\n", "Q:"),
        max_tokens=64,
    ),
    "word_sorting": Generation(
        "bbh/word_sorting.json.xz", **_BBH | {"answer": "{target}"}, stops=("\n", "Q:"), max_tokens=96
    ),
    "ifeval": Generation(
        "ifeval_en_first270.jsonl.xz", question="{prompt}", check_by="rules", stops=(), max_tokens=512
    ),
    "xstest": Generation(
        "xstest_prompts.csv.xz",
        question="{prompt}",
        answer="{label}",
        check_by="refusal",
        group="label",
        stops=(),
        max_tokens=64,
    ),
    "wikitext2": Documents("wikitext2_valid.txt.xz"),
}


def folder(given: str = "") -> pathlib.Path:
    """Where published task files lie: as given, else eval/ in the folder LLM_JAX_REFERENCE_DATA."""
    place = given or f"{os.environ.get('LLM_JAX_REFERENCE_DATA', '../shared/data')}/eval"
    return pathlib.Path(os.path.expanduser(place))


def tasks(
    names: Sequence[str], folder: pathlib.Path, few_shot: int = 0, limit: int | None = None
) -> list[tuple[str, Task, pathlib.Path]]:
    """All of them by `find`. Their items are read, so that a broken file is told before anything is asked.

    Raises UserError for two of one name, by which results are kept.
    """
    found: dict[str, tuple[str, Task, pathlib.Path]] = {}
    for typed in names:
        name, task, place = find(typed, folder)
        if name in found:
            raise UserError(f"two of the tasks {', '.join(names)} are named {name}: rename one's file")
        task.items(place, few_shot, limit)
        found[name] = name, task, place
    return list(found.values())


def find(name: str, folder: pathlib.Path) -> tuple[str, Task, pathlib.Path]:
    """(name, task, the folder of its files) of a published task, a probe, or the .json file of one's own."""
    if name in TASKS:
        task = TASKS[name]
        if not (folder / task.file).is_file():
            raise UserError(
                f"{name}: no file {folder / task.file}; --data=DIR names the folder of task files"
            )
        return name, task, folder
    if probe := probes.find(name):
        return name, probe, folder
    place = pathlib.Path(os.path.expanduser(name))
    if place.suffix != ".json":
        hint = configs.nearest(name, [*TASKS, *probes.PROBES, probes.SELF, "a .json file"])
        raise UserError(f"no task {name!r}; {hint}")
    try:
        value = json.loads(place.read_text())
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if isinstance(value, dict) and "kind" not in value:
        raise UserError(f"{place}: no kind; it is one of {', '.join(Task.members)}")
    sound(value, place)
    try:
        task = configs.from_json(Task, value, str(place))
        configs.check(task, str(place))
    except UserError as error:
        raise UserError(f"{place}: {str(error).removeprefix(str(place)).lstrip(':. ')}") from None
    if not task.file and not isinstance(task, probes.Probing):
        raise UserError(f"{place}: no file; it names that of the questions")
    return place.stem, task, place.parent
