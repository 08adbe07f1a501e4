import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Bytes, Files, HuggingFace, Markov, Mixture, Text, Weighted
from llm_jax.data.catalogue import catalogue
from llm_jax.data.store import tokenize
from llm_jax.data.windows import shuffled, turns


@pytest.fixture
def text(corpus) -> Text:
    return Text(Files((str(corpus),)), sequence_length=32, batch_size=4)


def stream(text: Text, side: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The plain way: all tokens of the held-out (0) or training (1) documents, and whose each is."""
    made = tokenize(text.corpus, catalogue(text.corpus), Bytes())
    order = text.splits([made])[0][side]
    pieces = [made.tokens[made.starts[d] : made.starts[d] + made.lengths[d]] for d in order]
    owner = np.repeat(np.arange(len(order)), [len(piece) for piece in pieces])
    return np.append(np.concatenate(pieces), 256), owner


def test_rows_are_the_windows_of_the_stream_each_once(text):
    source, (tokens, owner) = text.open(), stream(text)
    count = (len(tokens) - 1) // 32
    assert source.available_tokens == count * 32
    rows = source.rows(0, np.arange(count))
    expected = {}
    for window in range(count):
        whose = owner[window * 32 : window * 32 + 32]
        starts = np.flatnonzero(np.diff(whose, prepend=-1))
        segment = np.searchsorted(starts, np.arange(32), side="right")
        expected[tuple(tokens[window * 32 : window * 32 + 33])] = (
            segment,
            np.arange(32) - starts[segment - 1],
        )
    assert len(expected) == count
    for row in range(count):
        key = (*rows["tokens"][row], rows["targets"][row, -1])
        segments, positions = expected.pop(key)
        np.testing.assert_array_equal(rows["targets"][row], key[1:])
        np.testing.assert_array_equal(rows["segments"][row], segments)
        np.testing.assert_array_equal(rows["positions"][row], positions)
    assert not expected and rows["mask"].all()
    assert rows["segments"].max() > 1


def test_any_row_can_be_asked_for_directly(text):
    source = text.open()
    whole = source.rows(3, np.arange(40))
    some = np.array([39, 0, 17, 17])
    for name, values in text.open().rows(3, some).items():
        np.testing.assert_array_equal(values, whole[name][some])
        assert values.dtype == source.spec[name].dtype
        assert source.spec[name].shape == (4, 32)
    other = source.rows(4, np.arange(40))
    assert (other["tokens"] != whole["tokens"]).any(1).mean() > 0.9


def test_the_batch_size_does_not_change_the_rows(text):
    other = dataclasses.replace(text, batch_size=7)
    indices = np.arange(20)
    np.testing.assert_array_equal(
        text.open().rows(0, indices)["tokens"], other.open().rows(0, indices)["tokens"]
    )


def test_without_a_document_mask_a_row_is_one_document(text):
    source = dataclasses.replace(text, document_mask=False).open()
    assert set(source.spec) == {"tokens", "targets", "mask"} == set(source.rows(0, np.arange(2)))


def test_rows_past_the_first_epoch_are_refused_unless_repeating(text):
    source = text.open()
    last = source.available_tokens // 32
    source.rows(0, np.array([last - 1]))
    with pytest.raises(UserError, match=rf"row {last} lies past the first epoch.*data.repeat=true"):
        source.rows(0, np.array([0, last]))
    repeating = dataclasses.replace(text, repeat=True).open()
    assert repeating.available_tokens is None
    first, second = (repeating.rows(0, np.arange(last) + shift)["tokens"] for shift in (0, last))
    assert (first != second).any()
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))


def test_unique_tokens_are_a_nested_beginning_of_the_stream(text):
    full, tokens = text.open(), stream(text)[0]
    seen = []
    for unique in (160, 1600, full.available_tokens):
        source = dataclasses.replace(text, unique_tokens=unique).open()
        assert source.available_tokens == unique
        rows = source.rows(0, np.arange(unique // 32))["tokens"]
        seen.append({tuple(row) for row in rows})
        assert seen[-1] == {tuple(tokens[i : i + 32]) for i in range(0, unique, 32)}
        held, other = source.held_out(), full.held_out()
        assert (held.tokens, held.bytes) == (other.tokens, other.bytes)
    assert seen[0] < seen[1] < seen[2]
    with pytest.raises(UserError, match="unique_tokens is 1,000,000,000"):
        dataclasses.replace(text, unique_tokens=10**9).open()


def test_held_out_documents_are_scored_in_full(text):
    held = text.open().held_out()
    tokens, owner = stream(text, 0)
    batch = held.rows(np.arange(held.count + 3))  # the last ones only fill up
    mask, documents = batch["mask"].ravel().astype(bool), batch["document"].ravel()
    targets = batch["targets"].ravel()[mask]
    np.testing.assert_array_equal(targets, tokens[1:])
    np.testing.assert_array_equal(documents[mask], owner)
    assert documents.max() == held.documents - 1
    assert held.tokens == mask.sum() and held.bytes == held.tokens - held.documents


# ---- mixtures ----


def mixture(*weights: float, **fields) -> Text:
    chains = [Markov(2 + 3 * i, 1, documents_count=300, mean_length=50) for i in range(len(weights))]
    parts = tuple(Weighted(chain, weight) for chain, weight in zip(chains, weights, strict=True))
    return Text(Mixture(parts), **{"sequence_length": 16, "batch_size": 8, **fields})


def test_each_source_of_a_mixture_gets_its_share_of_every_stretch_of_rows():
    for weights in ((1.0,), (0.5, 0.3, 0.2), (7, 1), (0.9, 0.05, 0.05)):
        which, ranks = turns(weights)
        share = np.array(weights) / np.sum(weights)
        for stretch in (50, 137, 1000):
            seen = np.bincount(which[:stretch], minlength=len(weights))
            assert np.abs(seen - stretch * share).max() <= 3
        for number in range(len(weights)):
            np.testing.assert_array_equal(ranks[which == number], np.arange((which == number).sum()))
    with pytest.raises(UserError, match="too small a share"):
        turns((1.0, 0.0001))


def test_a_mixture_reads_each_window_of_each_source_once_an_epoch():
    text = mixture(0.7, 0.3, repeat=True)
    source = text.open()
    lasting = dataclasses.replace(text, repeat=False).open().available_tokens // 16
    before, after = source.epochs(lasting), source.epochs(lasting + 1)
    assert max(before.values()) == 1.0 < max(after.values())
    rows = source.rows(0, np.arange(lasting))["tokens"]
    alphabet = {ord(c) for c in "ab"} | {256}
    whose = np.array([set(row) <= alphabet for row in rows])
    assert abs(whose.mean() - 0.7) < 0.01
    alone = dataclasses.replace(text, corpus=text.corpus.parts[0].corpus, repeat=False).open()
    available = collections.Counter(
        map(tuple, alone.rows(0, np.arange(alone.available_tokens // 16))["tokens"])
    )
    assert collections.Counter(map(tuple, rows[whose])) <= available


def test_a_mixture_refuses_rows_past_the_epoch_of_its_scarcest_source():
    text = mixture(0.5, 0.5)
    source = text.open()
    last = source.available_tokens // 16
    source.rows(0, np.arange(last))
    with pytest.raises(UserError, match=r"lies past the first epoch of [01]:markov"):
        source.rows(0, np.arange(last + 1))
    parts = (text.corpus.parts[0], dataclasses.replace(text.corpus.parts[1], unique_tokens=320))
    scarce = dataclasses.replace(text, corpus=Mixture(parts)).open()
    assert 37 <= scarce.available_tokens // 16 <= 43
    with pytest.raises(UserError, match="each part"):
        config.check(dataclasses.replace(text, unique_tokens=320))


def test_a_mixture_scores_the_held_out_documents_of_all_its_sources():
    text = mixture(0.5, 0.5)
    both = text.open().held_out()
    parts = [dataclasses.replace(text, corpus=part.corpus).open().held_out() for part in text.corpus.parts]
    assert both.tokens == sum(part.tokens for part in parts) and both.bytes == sum(
        part.bytes for part in parts
    )
    batch = both.rows(np.arange(both.count))
    mask = batch["mask"].ravel()
    by_document = np.bincount(batch["document"].ravel(), mask, both.documents)
    assert mask.sum() == both.tokens and by_document.min() > 0 and len(by_document) == both.documents


def test_a_text_that_one_source_holds_out_is_trained_on_in_no_other(tmp_path):
    words = [f"document {n} " * (5 + n % 7) for n in range(400)]
    for name, chosen in (("some", words[:100]), ("all", words)):
        lines = [json.dumps({"text": text}) for text in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    corpora = [Files((str(tmp_path / f"{name}.jsonl"),)) for name in ("some", "all")]
    text = Text(Mixture(tuple(Weighted(part, 0.5) for part in corpora)), held_out_bytes=4000)
    found = [catalogue(part) for part in corpora]
    held, trained = (
        {
            int(hash)
            for item, sides in zip(found, text.splits(found), strict=True)
            for hash in item.hashes[sides[side]]
        }
        for side in (0, 1)
    )
    assert held and trained and not held & trained
    alone = [
        set(map(int, item.hashes[dataclasses.replace(text, corpus=part).splits([item])[0][1]]))
        for part, item in zip(corpora, found, strict=True)
    ]
    assert held & (alone[0] | alone[1]), "each source alone would have trained on what the other holds out"


# ---- the order of windows ----


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_shuffling_is_a_permutation(count):
    for key in (0, 1, 2**63):
        found = shuffled(np.arange(count), np.full(count, count), np.full(count, key, np.uint64))
        assert sorted(found) == list(range(count))


def test_shuffling_looks_random():
    orders = collections.Counter(
        tuple(shuffled(np.arange(4), np.full(4, 4), np.full(4, key, np.uint64))) for key in range(2400)
    )
    assert len(orders) == 24 and 60 < min(orders.values()) <= max(orders.values()) < 145
    found = shuffled(np.arange(10_000), np.full(10_000, 10_000), np.full(10_000, 7, np.uint64))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.05


def test_the_order_of_rows_is_pinned():
    """Resuming a run, on any machine and with any numpy, needs the very same order."""
    found = shuffled(np.arange(6), np.full(6, 1_000_003), np.full(6, 42, np.uint64))
    assert found.tolist() == [913702, 148121, 653691, 293080, 48419, 887009]


# ---- the rest of the contract ----


def test_the_record_is_json_and_counts_everything(text):
    record = json.loads(json.dumps(text.open().record))
    (source,) = record["sources"]
    assert source["documents"] == 40 == source["train_documents"] + record["held_out"]["documents"]
    assert source["bytes"] == source["train_bytes"] + record["held_out"]["bytes"]
    assert source["content"] == catalogue(text.corpus).content
    assert record["tokenizer"] == {
        "kind": "bytes",
        "vocabulary": 257,
        "fingerprint": "bytes",
        "library": None,
    }


def test_rows_can_be_loaded_shard_by_shard(text):
    source = text.open()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    whole = source.rows(0, np.arange(4))["tokens"]
    array = jax.make_array_from_callback(
        (4, 32), sharding, lambda index: source.rows(0, np.arange(4)[index[0]])["tokens"]
    )
    np.testing.assert_array_equal(array, whole)


# ---- what a user can get wrong ----


def test_a_corpus_shorter_than_one_batch_is_refused(text):
    has = dataclasses.replace(text, sequence_length=1, batch_size=1).open().available_tokens
    remedy = "lower --config.data.batch_size or --config.data.sequence_length"
    for shape in ({"batch_size": 4096}, {"sequence_length": 1 << 20}):
        long = dataclasses.replace(text, **shape)
        with pytest.raises(UserError, match=f"has {has:,} tokens .* {long.tokens_per_step:,}: .*{remedy}"):
            long.open()


def test_a_corpus_of_one_short_document_cannot_be_split(tmp_path):
    remedy = "give it more text, or score nothing by --config.data.held_out_fraction=0"
    for number, has in enumerate(("one document", "2 copies of one document")):
        (tmp_path / f"{number}.txt").write_text("hello")
        with pytest.raises(UserError, match=f"has only {has} of 5 bytes, .*{remedy}"):
            Text(Files((str(tmp_path),)), sequence_length=2, batch_size=1).open()
    source = Text(Files((str(tmp_path),)), sequence_length=2, batch_size=1, held_out_fraction=0.0).open()
    assert source.held_out() is None and source.record["held_out"] is None


def test_sizes_out_of_range_are_refused():
    for wrong in ({"sequence_length": 0}, {"batch_size": -1}, {"held_out_fraction": 0.6}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            config.check(Text(**wrong))


def test_a_tokenizer_that_loses_text_is_told_of(corpus, tmp_path, capsys):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    text = Text(Files((str(corpus),)), HuggingFace(str(tmp_path / "words.json")), 16, 2)
    assert text.open().record["tokenizer_loses_text"]
    assert "words.json loses some of these texts" in capsys.readouterr().err
    sound = Text(Files((str(corpus),)), sequence_length=16, batch_size=2).open().record
    assert "tokenizer_loses_text" not in sound and not capsys.readouterr().err
