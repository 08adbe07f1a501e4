"""Where the other tests' helpers are found: tiny parameters, tiny models of every family."""

import pathlib
import sys

TESTS = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "interop"), str(TESTS / "inference")]
