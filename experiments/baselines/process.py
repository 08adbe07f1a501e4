"""A process that is asked by lines of JSON on its standard input and answers each by one on its output."""

import json
import subprocess
from collections.abc import Sequence
from typing import Any, Self


class Process:
    """Runs `command` while the block lasts; options are those of subprocess.Popen."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, **options)

    def send(self, **question: Any) -> None:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def ask(self, **question: Any) -> dict[str, Any]:
        self.send(**question)
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait()
