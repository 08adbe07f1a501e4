"""Each test prepares its data in a cache of its own."""

import pathlib
import random

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LLM_JAX_CACHE", str(folder))
    return folder


WORDS = [*"abcdefghij", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "wizards"]


@pytest.fixture
def corpus(tmp_path) -> pathlib.Path:
    """A folder of 40 small texts of different lengths."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        words = random.Random(number).choices(WORDS, k=20 + 13 * number)
        (folder / f"{number:02}.txt").write_text(f"{number}: " + " ".join(words) + "\n")
    return folder
