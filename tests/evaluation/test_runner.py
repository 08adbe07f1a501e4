"""Log-likelihoods are transformers', batches and devices change nothing, and what was answered stays so."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.config import UserError
from llm_jax.evaluation import runner
from llm_jax.evaluation.requests import Generate, LogLikelihood, Rolling, key, pair
from llm_jax.evaluation.runner import Evaluator, content
from llm_jax.inference.sampling import Sampling
from llm_jax.score import score
from llm_jax.sharding import MeshConfig, make_mesh, shardings

LONG = "the grain in the plain remains and again the rain falls in spain " * 8
ASKED = [
    LogLikelihood("the rain in", " spain"),
    LogLikelihood("the rain in ", "spain"),  # the space belongs to the continuation
    LogLikelihood("the rain in", "s"),  # merges with what stands before
    LogLikelihood("the rain", "s in spain falls mainly"),
    LogLikelihood("", "the plain"),
    LogLikelihood("there", " is"),
    LogLikelihood("there", " are"),
    LogLikelihood(LONG, " again"),  # longer than the context
    LogLikelihood("<|user|>the grain?<|end|><|assistant|>", "again", written=True),
    Rolling("the rain in spain falls mainly in the plain"),
    Rolling(LONG),
]


@pytest.fixture(scope="module")
def theirs(saved):
    """(nats, greedy) of a request by torch and transformers, in the manner of lm-evaluation-harness."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def scored(before, after):
        window = (before + after)[-(64 + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)[-len(after) :]
        nats = -logits.gather(-1, torch.tensor(after)[:, None]).sum().item()
        return nats, logits.argmax(-1).tolist() == after

    def ask(request):
        if isinstance(request, Rolling):
            tokens, nats = ids(request.text), 0.0
            for start in range(0, len(tokens), 64):
                part = tokens[start : start + 64]
                nats += scored([0, *tokens][max(0, start + 1 + len(part) - 65) : start + 1], part)[0]
            return nats, None
        context, continuation = request.context, request.continuation
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = ids(context) if context else [0]
        after = ids(context + continuation)[len(before) if context else 0 :]
        return scored(before, after or ids(context + continuation)[-1:])

    return ask


def test_log_likelihoods_are_those_of_transformers(evaluator, theirs):
    for request, answer in zip(ASKED, evaluator.run(ASKED), strict=True):
        nats, greedy = theirs(request)
        assert answer.nats == pytest.approx(nats, abs=1e-3), request
        assert greedy is None or answer.greedy == greedy


def test_they_are_the_sums_of_the_scores_of_the_whole_text(opened, evaluator):
    request = LogLikelihood("the rain", " in spain falls")
    context, following = pair(opened, request)
    logprobs = score(opened, np.concatenate([context, following])[None]).logprobs[0]
    answer = evaluator.run([request])[0]
    assert answer.nats == pytest.approx(-logprobs[len(context) :].sum(), abs=1e-4)
    assert answer.tokens == len(following) and not answer.cut


def test_a_continuation_is_greedy_exactly_if_the_model_would_say_it(opened, evaluator):
    context = "the rain in"
    ids = opened.encode(context)
    best = int(score(opened, ids[None]).logits[0, -1].argmax())
    texts = [opened.tokenizer.decode([token]) for token in range(5, opened.tokenizer.vocabulary)]
    asked = [LogLikelihood(context, text) for text in texts if "\ufffd" not in text and text.strip()]
    for request, answer in zip(asked, evaluator.run(asked), strict=True):
        following = pair(opened, request)[1]
        if len(following) == 1 and np.array_equal(pair(opened, request)[0], ids):
            assert answer.greedy == (following[0] == best)


def test_answers_do_not_depend_on_what_is_asked_beside(opened, evaluator):
    together = evaluator.run(ASKED)
    for request, answer in zip(ASKED, together, strict=True):
        alone = Evaluator(opened).run([request])[0]
        assert alone.nats == pytest.approx(answer.nats, abs=1e-4)
        assert alone[1:] == answer[1:]


def test_what_does_not_fit_is_cut_at_its_beginning_and_counted(opened, evaluator):
    scored, generated = evaluator.run([ASKED[7], Generate(LONG, max_tokens=8)])
    size = len(opened.encode(LONG + " again"))
    assert scored.cut == size - 65
    assert generated.cut == len(opened.encode(LONG)) - 56 and generated.tokens <= 8
    with pytest.raises(UserError, match=r"a continuation has .* tokens, and the model reads 64"):
        evaluator.run([LogLikelihood("the", LONG)])
    with pytest.raises(UserError, match="a continuation is empty"):
        evaluator.run([LogLikelihood("the", "")])


def test_a_rolled_text_is_scored_token_by_token_once(opened, evaluator):
    assert evaluator.run([Rolling(LONG)])[0].tokens == len(opened.encode(LONG))
    assert evaluator.run([Rolling("")])[0] == (0.0, 0, True, 0)


def test_a_killed_evaluation_answers_only_what_is_missing(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    asked = [*ASKED[:4], Generate("the rain", max_tokens=5), Generate("the rain", (" the",), 6)]
    first = Evaluator(opened, keep=True).run(asked)
    file = tmp_path / "evaluation" / f"{content(opened)}.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == len(asked)
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])  # killed in the last line
    again, done = Evaluator(opened, keep=True), []
    keep = runner._Kept.__setitem__
    monkeypatch.setattr(runner._Kept, "__setitem__", lambda *a: (done.append(a[1]), keep(*a)))
    assert again.run(asked) == first
    assert len(done) == 1
    assert Evaluator(opened, keep=True).run([*asked, *asked]) == first + first and len(done) == 1


def test_another_model_or_request_has_answers_of_its_own(opened):
    leaves, tree = jax.tree.flatten(opened.params)
    changed = jax.tree.unflatten(tree, [leaves[0].at[..., 0].add(1e-3), *leaves[1:]])
    others = [
        opened._replace(params=changed),
        opened._replace(config=dataclasses.replace(opened.config, heads=2)),
        opened._replace(context=63),
        opened._replace(tokenizer=dataclasses.replace(opened.tokenizer, stops=())),
    ]
    assert len({content(one) for one in (opened, *others)}) == 5
    assert content(opened._replace(name="renamed")) == content(opened)
    asked = [
        Generate("a"),
        Generate("a", max_tokens=9),
        Generate("a", ("b",)),
        Generate("a", sampling=Sampling(1.0)),
        Rolling("a"),
        LogLikelihood("a", "b"),
        LogLikelihood("", "ab"),
        LogLikelihood("a", "b", True),
    ]
    assert len({key(one) for one in asked}) == len(asked)


def test_eight_devices_give_the_answers_of_one(opened, evaluator):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = opened.config.build()
    axes = jax.tree.map(lambda role: role.axes, model.roles(opened.params))
    params = jax.device_put(opened.params, shardings(opened.params, axes, mesh))
    spread = opened._replace(params=params, mesh=mesh)
    asked = [*ASKED, Generate("the rain", max_tokens=6)]
    for one, many in zip(evaluator.run(asked), Evaluator(spread).run(asked), strict=True):
        assert one[1:] == many[1:]
        assert one[0] == (many[0] if isinstance(one[0], str) else pytest.approx(many[0], abs=1e-3))


def test_a_model_without_a_tokenizer_is_asked_nothing(opened):
    with pytest.raises(UserError, match="tiny has no tokenizer"):
        Evaluator(opened._replace(tokenizer=None)).run([Rolling("a")])
