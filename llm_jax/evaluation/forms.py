"""Records of published task files as plain fields, where they aren't: one function a form."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]


def truthful_qa(record: Record) -> Record:
    """TruthfulQA.csv: the best answer among the incorrect ones (its "MC1" of one right choice)."""
    wrong = [text.strip() for text in record["Incorrect Answers"].split(";")]
    choices = dict.fromkeys([record["Best Answer"].strip(), *filter(None, wrong)])
    return {
        "question": record["Question"],
        "choices": list(choices),
        "answer": 0,
        "category": record["Category"],
    }


def big_bench(record: Record) -> Record:
    """BIG-Bench Hard: the choices are the lines "(A) …" of the input, where it has any."""
    choices = re.findall(r"^\([A-Z]\)", record["input"], re.MULTILINE)
    return {"input": record["input"], "target": record["target"], "choices": choices}


def gsm8k(record: Record) -> Record:
    """Without the calculator's annotations <<1+2=3>>; `result` is what stands behind ####."""
    reasoning = re.sub(r"<<[^>]*>>", "", record["answer"])
    return {
        "question": record["question"],
        "answer": reasoning,
        "result": reasoning.rpartition("####")[2].strip(),
    }


READERS: dict[str, Callable[[Record], Record]] = {
    "plain": lambda record: record,
    "truthful_qa": truthful_qa,
    "big_bench": big_bench,
    "gsm8k": gsm8k,
}
