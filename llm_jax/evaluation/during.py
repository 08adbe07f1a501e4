"""Tasks that a run is asked while it trains: each metric NAME/METRIC stands beside the held-out loss.

--config.execution.tasks.names=letters,mine.json --config.execution.evaluate_every_steps=100
--config.execution.checkpoint.keep_best=letters/accuracy
"""

import jax

from llm_jax.config import UserError
from llm_jax.data import Source
from llm_jax.evaluation import standard
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import evaluate
from llm_jax.evaluation.tasks import Format
from llm_jax.inference.opening import Opened, context_of, tokenizer_of
from llm_jax.models import Params
from llm_jax.run import Run


class Asking:
    """A hook that asks a run's tasks of the parameters that it is given. metrics: by which value is best.

    Raises UserError for tasks that aren't there, for a run that generates no text, and in many processes.
    """

    def __init__(self, run: Run, source: Source) -> None:
        asked = run.execution.tasks
        if jax.process_count() > 1:
            raise UserError(
                "execution.tasks are asked in one process, and this run has several: ask what it saves, "
                "python -m llm_jax.evaluate --model=RUN --tasks=…"
            )
        self._tasks = [standard.find(name, standard.folder(asked.data)) for name in asked.names]
        self._run, self._source, self._model = run, source, run.resolved_model.build()
        if not hasattr(run.data, "tokenizer") or self._model.decode is None:
            raise UserError(f"execution.tasks: a {run.model.kind} on {run.data.kind} answers no questions")
        self._evaluator: Evaluator | None = None
        self.metrics = {
            f"{name}/{metric}": best for name, task, _ in self._tasks for metric, best in task.metrics.items()
        }

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        params, asked, found = self._model.merge(params), self._run.execution.tasks, {}
        if self._evaluator is None:
            self._evaluator = Evaluator(self._opened(params))
        else:
            self._evaluator.exchange(params)
        for name, task, folder in self._tasks:
            outcome = evaluate(self._evaluator, name, task, folder, Format(asked.chat), asked.limit)
            metrics = outcome.metrics().items()
            found |= {f"{name}/{metric}": one.value for metric, one in metrics if "/" not in metric}
        return found

    def _opened(self, params: Params) -> Opened:
        data, config = self._run.data, self._run.resolved_model.merged
        tokenizer = tokenizer_of(data, self._source.codec)
        place = jax.tree.leaves(params)[0].sharding
        mesh = place.mesh if isinstance(place, jax.sharding.NamedSharding) else None
        name = self._run.name or self._run.identity()
        return Opened(name, config, params, tokenizer, context_of(config, data.sequence_length), mesh)
