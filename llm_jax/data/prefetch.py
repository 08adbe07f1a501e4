"""A source as a grain dataset, for what grain does well: reading ahead in threads, chaining, mapping."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from llm_jax.data.sources import Batch, Source

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Grain's random access: item s is the global batch of step s."""

    source: Source
    seed: int
    batch_size: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.source.rows(self.seed, step * self.batch_size + np.arange(self.batch_size))


def dataset(source: Source, seed: int, batch_size: int, steps: int) -> "grain.MapDataset":
    """The batches of `steps` steps, by random access: item s is that of step s (in use: see sources.py).

    A slice `[first:]` resumes, so there is no iterator's state to save.
    """
    import grain

    return grain.MapDataset.source(_Steps(source, seed, batch_size, steps))
