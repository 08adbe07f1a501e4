"""An experiment for the launcher's tests: a classifier learns the parity of three bits, in a second or two.

Its data can be slow, or break the process that reads it at a chosen step: what launching has to cope with.
"""

import dataclasses
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.config import UserError
from llm_jax.data import DataConfig, Source
from llm_jax.losses import Objective
from llm_jax.models import Model, ModelConfig, Output, Term
from llm_jax.optimizers import AdamW
from llm_jax.run import Cell, Checkpointing, Execution, Run

SCALES = {"small": 3, "slow": 1}


@dataclasses.dataclass(frozen=True)
class Bits(DataConfig, kind="bits"):
    """Row i holds the bits of i. At step `trouble_at` reading does what `trouble` says."""

    batch_size: int = 16
    vocabulary: int = 2
    seconds: float = 0.0
    trouble: str = ""
    trouble_at: int = 10

    def open(self):
        return BitSource(self)


class BitSource(Source):
    def __init__(self, config):
        self.config = config
        rows = config.batch_size
        self.spec = {
            "bits": jax.ShapeDtypeStruct((rows, 3), np.float32),
            "label": jax.ShapeDtypeStruct((rows,), np.int32),
        }

    def rows(self, seed, indices):
        time.sleep(self.config.seconds)
        if self.config.trouble and indices.min() >= self.config.trouble_at * self.config.batch_size:
            match self.config.trouble:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "error":
                    raise RuntimeError("these bits are broken")
                case "user":
                    raise UserError("these bits are not for you")
        bits = (indices[:, None] >> np.arange(3)) % 2
        return {"bits": bits.astype(np.float32), "label": (bits.sum(1) % 2).astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class Classifier(ModelConfig, kind="bits_classifier"):
    width: int = 16

    def build(self, layout=None):
        def init(key):
            up, down = jax.random.split(key)
            return {
                "up": jax.random.normal(up, (4, self.width)),
                "down": jax.random.normal(down, (self.width, 2)),
            }

        def apply(params, batch, key):
            bits = jnp.pad(batch["bits"], ((0, 0), (0, 1)), constant_values=1.0)
            return Output(jnp.tanh(bits @ params["up"]), {})

        return Model(init, apply, lambda params, hidden: hidden @ params["down"])


@dataclasses.dataclass(frozen=True)
class LabelLoss(Objective, kind="bits_label"):
    def terms(self, model, params, batch, key, weights):
        logits = model.unembed(params, model.apply(params, batch, key).hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": Term(losses.sum(), jnp.float32(losses.size))}


def get_config(scale):
    data = Bits(seconds=0.04 if scale == "slow" else 0.0)
    execution = Execution(checkpoint=Checkpointing(every_seconds=0.0, every_steps=20))
    return Run(
        Classifier(), data, AdamW(learning_rate=0.03), LabelLoss(), tokens=16 * 100, execution=execution
    )


def sweep(base):
    runs = SCALES["slow" if base.data.seconds else "small"]
    return [
        dataclasses.replace(base, seed=seed, name=f"seed-{seed}", cell=Cell("grid")) for seed in range(runs)
    ]


def hooks(run):
    """What workers are to measure with every evaluation, here the one at the end."""
    return [lambda step, params: {"seed_and_step": run.seed + step}]
