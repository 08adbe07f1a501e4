"""What is sampled from is what transformers' logits processors leave, row by row."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llm_jax.config import UserError
from llm_jax.inference.sampling import Sampling, Settings, processed, sample

V = 29
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2
TEXT = np.array([3, 7, 7, 20])
ROWS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=0.8, min_p=0.2),
    Sampling(temperature=0.9, top_k=8, top_p=0.7, min_p=0.05),
    Sampling(temperature=0.9, top_k=100, repetition_penalty=1.4),
    Sampling(temperature=1.1, top_k=4, repetition_penalty=0.7, logit_bias={7: 4.0, 3: -100.0}),
    Sampling(repetition_penalty=2.5, logit_bias={0: 1.5}),
]


def batch(rows):
    logits = np.repeat(LOGITS[None], len(rows), 0)
    seen = np.zeros((len(rows), V), bool)
    seen[:, TEXT] = True
    return logits, Settings.of(rows, V), seen


def test_rows_of_a_batch_are_processed_as_by_transformers_one_by_one():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def theirs(row):
        t = transformers
        chain = t.LogitsProcessorList()
        if row.logit_bias:
            bias = {(token,): value for token, value in row.logit_bias.items()}
            chain.append(t.SequenceBiasLogitsProcessor(bias))
        if row.repetition_penalty != 1:
            chain.append(t.RepetitionPenaltyLogitsProcessor(row.repetition_penalty))
        if row.temperature:
            chain.append(t.TemperatureLogitsWarper(row.temperature))
            if row.top_k:
                chain.append(t.TopKLogitsWarper(row.top_k))
            if row.top_p < 1:
                chain.append(t.TopPLogitsWarper(row.top_p))
            if row.min_p:
                chain.append(t.MinPLogitsWarper(row.min_p))
        return chain(torch.from_numpy(TEXT)[None], torch.from_numpy(LOGITS)[None].clone())[0].numpy()

    ours = np.asarray(jax.jit(processed)(*batch(ROWS)))
    for row, found in zip(ROWS, ours, strict=True):
        expected = theirs(row)
        np.testing.assert_allclose(found, expected - expected.max(), rtol=1e-5, atol=2e-6, err_msg=str(row))


def test_what_is_cut_is_what_the_definitions_say():
    ours = np.asarray(jax.jit(processed)(*batch(ROWS)))
    kept = np.isfinite(ours)
    probable = np.exp(LOGITS / 1.3) / np.exp(LOGITS / 1.3).sum()
    order = np.argsort(-probable)
    nucleus = order[: 1 + np.searchsorted(np.cumsum(probable[order]), 0.6)]
    assert set(np.flatnonzero(kept[2])) == set(nucleus)
    assert kept[1].sum() == 5 and kept[3].sum() == 1 and kept[0].all()
    ratio = np.exp((LOGITS - LOGITS.max()) / 0.8)
    np.testing.assert_array_equal(kept[4], ratio >= 0.2)


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Sampling(1.0, top_p=1e-50), [LOGITS.argmax()]),
        (Sampling(1e-39), [LOGITS.argmax()]),
        (Sampling(1e-39, top_p=1e-50, min_p=1.0), [LOGITS.argmax()]),
        (Sampling(1.0, top_k=2**40), range(V)),
        (Sampling(1e300), range(V)),
        (Sampling(1e300, logit_bias={t: -math.inf for t in range(3, V)}), range(3)),
        (Sampling(1.0, logit_bias={4: -1e300, 5: 1e300}), [5]),
        (Sampling(1.0, repetition_penalty=1e-300), [max(TEXT, key=LOGITS.__getitem__)]),
        (Sampling(0.5, repetition_penalty=1e300, logit_bias={t: -1e300 for t in range(V)}), range(V)),
    ],
)
def test_settings_beyond_float32_mean_what_they_tend_to(row, kept):
    row.check(V)
    left = np.asarray(jax.jit(processed)(*batch([row])))[0].astype(np.float64)
    assert not np.isnan(left).any() and left.max() == 0
    chances = np.exp(left) / np.exp(left).sum()
    expected = np.isin(np.arange(V), kept)
    if row.temperature == 1.0 and len(kept) == V:
        np.testing.assert_allclose(chances, np.exp(LOGITS) / np.exp(LOGITS).sum(), rtol=1e-4)
    else:
        np.testing.assert_allclose(chances[~expected], 0, atol=1e-30)
        assert np.all(chances[expected] > 0)
        if row.temperature == 1e300:
            np.testing.assert_allclose(chances[expected], 1 / expected.sum(), rtol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_probable_and_the_same_for_the_same_key():
    count = 4000
    rows = [dataclasses.replace(ROWS[5], temperature=0.9)] * count + [Sampling()]
    keys = jax.random.split(jax.random.key(1), len(rows))
    draw = jax.jit(sample)
    logits, settings, seen = batch(rows)
    tokens = np.asarray(draw(logits, settings, seen, keys))
    assert tokens[-1] == LOGITS.argmax()
    # Alone, a row draws what it draws in company.
    again = np.asarray(draw(logits, settings, seen, keys[::-1]))[::-1]
    np.testing.assert_array_equal(tokens[1:-1], again[1:-1])
    left = np.asarray(jax.jit(processed)(*batch(ROWS)))[5]
    expected = np.exp(left) / np.exp(left).sum()
    found = np.bincount(tokens[:-1], minlength=V) / count
    assert np.all(found[expected == 0] == 0)
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / count)


def test_of_tokens_equally_probable_the_first_is_taken():
    logits = np.array([[0, 3, 1, 3], [5, 5, 5, 5], [1, 2, 3, 4]], np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.jit(sample)(logits, Settings.of([Sampling()] * 3, 4), np.zeros((3, 4), bool), keys)
    assert found.tolist() == logits.argmax(-1).tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it is a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; it is above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"logit_bias": {V: 1.0}}, f"ids lie in 0 .. {V - 1}"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(setting, names):
    with pytest.raises(UserError, match=names.replace("..", r"\.\.")):
        Sampling(**setting).check(V)
