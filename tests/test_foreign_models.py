"""Three models that aren't next-token decoders, each trained by the unchanged train.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.data import DataConfig, Source
from llm_jax.losses import Objective
from llm_jax.models import Model, ModelConfig, Output, Term
from llm_jax.optimizers import AdamW
from llm_jax.run import Run
from llm_jax.train import train


class Rows(Source):
    """A source whose row i is `make(generator of (seed, i))`."""

    def __init__(self, batch_size, make):
        self.make = make
        row = make(np.random.default_rng(0))
        self.spec = {k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype) for k, v in row.items()}

    def rows(self, seed, indices):
        rows = [self.make(np.random.default_rng([seed, int(i)])) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class Synthetic(DataConfig):
    """One row is one unit of data; members say what a row is."""

    batch_size: int = 16
    vocabulary: int = 12

    @property
    def tokens_per_step(self):
        return self.batch_size

    def open(self):
        return Rows(self.batch_size, self.row)


def mean_loss(losses, mask=None):
    mask = jnp.ones_like(losses) if mask is None else mask
    return {"loss": Term((losses * mask).sum(), mask.sum())}


# ---- skip-gram: no sequence, sampled negatives (Mikolov et al. 2013, equation 4) ----


@dataclasses.dataclass(frozen=True)
class Neighbours(Synthetic, kind="neighbours"):
    def row(self, rng):
        word = rng.integers(self.vocabulary)
        near = (word + rng.choice([-1, 1])) % self.vocabulary
        return {
            "word": np.int32(word),
            "near": np.int32(near),
            "negatives": rng.integers(self.vocabulary, size=4),
        }


@dataclasses.dataclass(frozen=True)
class SkipGram(ModelConfig, kind="skip_gram"):
    vocabulary: int = 12
    width: int = 8

    def build(self, layout=None):
        def init(key):
            table = 0.1 * jax.random.normal(key, (2, self.vocabulary, self.width))
            return {"word": table[0], "context": table[1]}

        return Model(init, lambda params, batch, key: Output(params["word"][batch["word"]], {}))


@dataclasses.dataclass(frozen=True)
class NegativeSampling(Objective, kind="negative_sampling"):
    def terms(self, model, params, batch, key, weights):
        hidden = model.apply(params, batch, key).hidden
        contexts = params["context"][jnp.concatenate([batch["near"][:, None], batch["negatives"]], 1)]
        signs = jnp.array([1.0] + [-1.0] * batch["negatives"].shape[1])
        return mean_loss(-jax.nn.log_sigmoid(signs * jnp.einsum("bd,bnd->bn", hidden, contexts)).sum(-1))


# ---- encoder-decoder: two inputs, a mask over the target; the task is to copy the source reversed ----


@dataclasses.dataclass(frozen=True)
class Reversal(Synthetic, kind="reversal"):
    length: int = 5

    def row(self, rng):
        source = rng.integers(1, self.vocabulary, size=self.length).astype(np.int32)
        mask = (np.arange(self.length) < rng.integers(2, self.length + 1)).astype(np.float32)
        return {"source": source, "target": source[::-1].copy(), "mask": mask}


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(ModelConfig, kind="encoder_decoder"):
    vocabulary: int = 12
    width: int = 32

    def build(self, layout=None):
        def init(key):
            shapes = {
                "embedding": (self.vocabulary, self.width),
                "place": (16, self.width),
                "query": (self.width,) * 2,
            }
            keys = jax.random.split(key, len(shapes))
            return {
                name: 0.2 * jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)
            }

        def apply(params, batch, key):
            place = params["place"][: batch["source"].shape[1]]
            memory = params["embedding"][batch["source"]] + place
            shifted = jnp.pad(batch["target"], ((0, 0), (1, 0)))[:, :-1]
            queries = (params["embedding"][shifted] + place) @ params["query"]
            attention = jax.nn.softmax(jnp.einsum("btd,bsd->bts", queries, memory))
            return Output(jnp.einsum("bts,bsd->btd", attention, memory), {})

        return Model(init, apply, lambda params, hidden: hidden @ params["embedding"].T)


@dataclasses.dataclass(frozen=True)
class Translation(Objective, kind="translation"):
    def terms(self, model, params, batch, key, weights):
        logits = model.unembed(params, model.apply(params, batch, key).hidden)
        return mean_loss(
            optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]), batch["mask"]
        )


# ---- a classifier: one label a row ----


@dataclasses.dataclass(frozen=True)
class Parity(Synthetic, kind="parity"):
    def row(self, rng):
        bits = rng.integers(2, size=3)
        return {"bits": bits.astype(np.float32), "label": np.int32(bits.sum() % 2)}


@dataclasses.dataclass(frozen=True)
class Classifier(ModelConfig, kind="classifier"):
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
class LabelLoss(Objective, kind="label_loss"):
    def terms(self, model, params, batch, key, weights):
        logits = model.unembed(params, model.apply(params, batch, key).hidden)
        return mean_loss(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


@pytest.mark.parametrize(
    ("model", "data", "objective", "steps", "reached"),
    [
        (SkipGram(), Neighbours(), NegativeSampling(), 300, 2.7),  # 5 ln 2 = 3.47 knows nothing
        (EncoderDecoder(), Reversal(), Translation(), 300, 1.0),  # ln 11 = 2.40 knows nothing
        (Classifier(), Parity(), LabelLoss(), 300, 0.1),  # ln 2 = 0.69 knows nothing
    ],
    ids=["skip_gram", "encoder_decoder", "classifier"],
)
def test_a_foreign_model_is_trained_by_the_unchanged_trainer(
    tmp_path, model, data, objective, steps, reached
):
    run = Run(model, data, AdamW(learning_rate=0.03), objective, tokens=steps * data.batch_size)
    result = train(run, tmp_path / "run")
    assert result["status"] == "done"
    assert result["train_loss"] < reached
    assert result["D"] == steps * data.batch_size
