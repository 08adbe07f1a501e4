"""Where the other tests' helpers are found: tiny parameters, tiny models of every family."""

import pathlib
import sys

import pytest

TESTS = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "interop"), str(TESTS / "inference")]


@pytest.fixture(scope="session")
def web():
    """A server of a tiny model with a chat template, and of one without."""
    from serving import BASE, TINY, Web

    from llm_jax.inference.conversation import Speaker

    speakers = [Speaker(TINY, slots=4, candidates=20), Speaker(BASE, slots=4, candidates=20)]
    with Web(speakers, system="Be.") as found:
        yield found


@pytest.fixture(scope="session")
def calling():
    """A server of a model that calls the calculator, which is there."""
    from serving import CALLING, Web, caller

    from llm_jax.inference.conversation import Speaker
    from llm_jax.inference.tools import toolbox

    tools = toolbox(["calculator", "calendar"])
    with Web([Speaker(caller(), slots=4, candidates=20)], tools=tools, **CALLING) as found:
        yield found
