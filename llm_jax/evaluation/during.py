"""Tasks that a run is asked while it trains: each metric NAME/METRIC stands beside the held-out loss.

--config.execution.tasks.names=letters,mine.json --config.execution.evaluate_every_steps=100
--config.execution.checkpoint.keep_best=letters/accuracy
"""

import jax

from llm_jax import sharding
from llm_jax.config import UserError
from llm_jax.data import Source
from llm_jax.distributed import agreed
from llm_jax.evaluation import standard
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import evaluate
from llm_jax.evaluation.tasks import Format
from llm_jax.inference.opening import Opened, context_of, tokenizer_of
from llm_jax.kernels import memory
from llm_jax.models import Params
from llm_jax.run import Run
from llm_jax.sharding import MeshConfig


class Asking:
    """A hook that asks a run's tasks of the parameters that it is given. metrics: by which value is best.

    In many processes number 0 asks a copy on one device of its own. Raises UserError for tasks that aren't
    there, for a run that generates no text, and for a copy that its device has no room for.
    """

    def __init__(self, run: Run, source: Source) -> None:
        asked = run.execution.tasks
        self._tasks = standard.tasks(asked.names, standard.folder(asked.data), limit=asked.limit)
        self._run, self._source, self._model = run, source, run.resolved_model.build()
        if not hasattr(run.data, "tokenizer") or self._model.decode is None:
            raise UserError(f"execution.tasks: a {run.model.kind} on {run.data.kind} answers no questions")
        self._evaluator: Evaluator | None = None
        self._alone = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
        if jax.process_count() > 1:
            self._refuse_large()
        self.metrics = {
            f"{name}/{metric}": best for name, task, _ in self._tasks for metric, best in task.metrics.items()
        }

    def _refuse_large(self) -> None:
        leaves = jax.tree.leaves(jax.eval_shape(self._model.init, jax.random.key(0)))
        size, room = sum(x.size * x.dtype.itemsize for x in leaves), memory.room(self._alone)
        if room is not None and 2 * size > room:
            raise UserError(
                "execution.tasks: in many processes one device is asked, which has no room for two copies of "
                f"{size / 1e9:,.1f} GB: ask what is saved, python -m llm_jax.evaluate --model=RUN --tasks=…"
            )

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        params = self._model.merge(params)
        if jax.process_count() == 1:
            return self._asked(params)
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        params = jax.tree.map(lambda x: x.addressable_data(0), sharding.everywhere(params, mesh))
        with jax.set_mesh(self._alone):
            return agreed(lambda: self._asked(jax.device_put(params, sharding.whole(self._alone))))

    def _asked(self, params: Params) -> dict[str, float]:
        asked, found = self._run.execution.tasks, {}
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
