"""llm_jax: scaling experiments for language models in JAX. ARCHITECTURE.md shows the rooms of this house."""

import sys
from types import TracebackType


def _plainly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # so it is while `python -m llm_jax.COMMAND` loads its modules, before run_main
    sys.excepthook = _plainly
