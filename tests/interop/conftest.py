"""Where these tests find `reference.py` and the parameters that tests of models use."""

import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for folder in (".", "../models"):
    sys.path.insert(0, str((pathlib.Path(__file__).parent / folder).resolve()))
