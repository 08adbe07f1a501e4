import numpy as np

from llm_jax.config import check
from llm_jax.data import sources


def test_the_source_in_the_documentation_works():
    example = sources.__doc__.split("one config:\n")[1]
    lines = [line[4:] for line in example.splitlines()]
    names = vars(sources) | {"np": np}
    exec("from typing import ClassVar\n" + "\n".join(lines), names)
    config = names["SquaresConfig"](batch_size=3)
    check(config)
    source = config.open()
    rows = source.rows(0, np.arange(3))
    assert config.tokens_per_step == 3 and source.available_tokens is None and source.held_out() is None
    for name, spec in source.spec.items():
        assert rows[name].shape == spec.shape and rows[name].dtype == spec.dtype
    np.testing.assert_allclose(rows["y"], rows["x"] ** 2)
