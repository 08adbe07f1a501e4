import re
import textwrap

import numpy as np

from llm_jax.config import check
from llm_jax.data import sources


def example(after: str) -> str:
    """The indented lines of the documentation that follow one that ends in `after`."""
    return textwrap.dedent(re.split(r"\n(?=\S)", sources.__doc__.split(after + ":\n")[1])[0])


def test_the_source_in_the_documentation_works():
    names = vars(sources) | {"np": np, "__name__": "documentation"}
    exec("from typing import ClassVar\n" + example("one config"), names)
    config = names["SquaresConfig"](batch_size=3)
    check(config)
    source = config.open()
    rows = source.rows(0, np.arange(3))
    assert config.tokens_per_step == 3 and source.available_tokens is None and source.held_out() is None
    for name, spec in source.spec.items():
        assert rows[name].shape == spec.shape and rows[name].dtype == spec.dtype
    np.testing.assert_allclose(rows["y"], rows["x"] ** 2)
