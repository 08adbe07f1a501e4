import itertools

import numpy as np
import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Markov, Text

CHAIN = Markov(states=4, order=2, documents_count=2048, mean_length=40, seed=1)


def test_the_stationary_distribution_is_one():
    share = CHAIN.stationary
    following = np.zeros_like(share)
    for context in range(16):
        for symbol in range(4):
            following[(context * 4 + symbol) % 16] += share[context] * CHAIN.transitions[context, symbol]
    np.testing.assert_allclose(following, share, atol=1e-14)
    assert share.sum() == pytest.approx(1, abs=1e-14)


def true_nats(batch: dict, chain: Markov) -> np.ndarray:
    """What the best predictor, who knows the chain, loses on each target [B, T]."""
    states, end = chain.states, 1 / chain.mean_length
    alphabet = "abcdefghijklmnopqrstuvwxyz"[:states]
    joint = chain.stationary[:, None] * chain.transitions
    log_next = {}
    for seen in range(chain.order + 1):
        both = joint.reshape(-1, states**seen, states).sum(0)
        log_next[seen] = np.log(both / both.sum(1, keepdims=True))
    out = np.zeros(batch["tokens"].shape)
    for row, (tokens, targets) in enumerate(zip(batch["tokens"], batch["targets"], strict=True)):
        context: list[int] = []
        for place, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            context = [] if token == 256 else [*context, alphabet.index(chr(token))][-chain.order :]
            number = sum(digit * states**power for power, digit in enumerate(reversed(context)))
            if target == 256:
                out[row, place] = -np.log(end)
            else:
                alive = -np.log1p(-end) if context else 0.0
                out[row, place] = alive - log_next[len(context)][number, alphabet.index(chr(target))]
    return out


@pytest.mark.parametrize("length", [2, 16])
def test_the_stated_entropy_is_what_the_best_predictor_loses(length):
    source = Text(CHAIN, sequence_length=length, held_out_fraction=0.5, held_out_bytes=1 << 30).open()
    held = source.held_out()
    nats, tokens = np.zeros(held.documents), np.zeros(held.documents)
    for start in range(0, held.count, 512):
        batch = held.rows(np.arange(start, start + 512))
        weights = batch["mask"].ravel()
        nats += np.bincount(
            batch["document"].ravel(), true_nats(batch, CHAIN).ravel() * weights, held.documents
        )
        tokens += np.bincount(batch["document"].ravel(), weights, held.documents)
    loss = nats.sum() / held.tokens
    error = np.sqrt(((nats - loss * tokens) ** 2).sum()) / held.tokens
    assert error < 0.01
    assert loss == pytest.approx(CHAIN.entropy(length), abs=3 * error)
    assert source.record["sources"][0]["entropy"] == CHAIN.entropy(length)
    np.testing.assert_allclose(CHAIN.nats(batch["tokens"], batch["targets"]), true_nats(batch, CHAIN))


def test_longer_windows_cost_less_and_the_limit_is_the_entropy_rate():
    costs = [CHAIN.entropy(length) for length in (1, 2, 8, 64, 1024)]
    assert all(a > b for a, b in itertools.pairwise(costs))
    assert costs[-1] - CHAIN.entropy() < 1e-3
    endless = Markov(states=4, order=2, mean_length=10**9, seed=1)
    rate = -(CHAIN.stationary[:, None] * CHAIN.transitions * np.log(CHAIN.transitions)).sum()
    assert endless.entropy() == pytest.approx(rate, abs=1e-6)


def test_more_documents_extend_the_corpus():
    def read(count: int) -> list[str]:
        return ["".join(d) for d in Markov(documents_count=count, mean_length=10).documents()]

    assert read(1030)[:20] == read(20)


def test_chains_beyond_the_limits_are_refused():
    for wrong in (Markov(states=1), Markov(states=95), Markov(order=0), Markov(states=64, order=4)):
        with pytest.raises(UserError):
            config.check(wrong)
