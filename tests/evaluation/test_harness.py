"""lm-evaluation-harness finds the same with our evaluator as with its own transformers model, offline."""

import json
import types

import pytest

from llm_jax.config import UserError

lm_eval = pytest.importorskip("lm_eval", reason="the extra `harness` isn't installed")
pytest.importorskip("transformers", reason="the harness's own model needs transformers")

RECORDS = [
    {
        "question": f"the rain {word}",
        "choices": ["in spain", "again", "the plain"],
        "gold": n % 3,
        "text": f"{word} " * 40,
    }
    for n, word in enumerate("falls remains mainly there again in the grain".split())  # noqa: SIM905
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One task of each output type on a local file."""
    place = tmp_path_factory.mktemp("tasks") / "records.jsonl"
    place.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place)}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": [" the"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolled = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "doc_to_text": ""}
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    return [
        {"task": "choice", **shared, **choice, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {"task": "written", **shared, **written},
        {"task": "rolled", **shared, **rolled, "metric_list": metrics},
    ]


@pytest.fixture(scope="module")
def models(saved, evaluator):
    """Ours, and the harness's own over the same files."""
    from lm_eval.models.huggingface import HFLM

    from llm_jax.evaluation.harness import HarnessModel

    theirs = HFLM(pretrained=str(saved), device="cpu", dtype="float32", batch_size=1, max_length=64)
    return lambda: HarnessModel(evaluator), theirs


@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_finds_the_same_with_both(models, tasks, chat, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = []
    for model in (models[0](), models[1]):
        result = lm_eval.simple_evaluate(
            model=model,
            tasks=[dict(task) for task in tasks],
            apply_chat_template=chat,
            num_fewshot=1 if chat else None,
            fewshot_as_multiturn=chat or None,
            bootstrap_iters=0,
            log_samples=True,
            cache_requests=False,
        )
        found.append(result)
    ours, theirs = found
    for task in ("choice", "written", "rolled"):
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-3), (task, name)
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            mine, yours = one["resps"], other["resps"]
            if task == "written":
                assert mine == yours
            elif task == "rolled":
                assert float(mine[0][0]) == pytest.approx(float(yours[0][0]), abs=1e-3 * 60)
            else:
                for (a,), (b,) in zip(mine, yours, strict=True):
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3) and str(a[1]) == str(b[1])


def asked(*args):
    """A request as the harness makes it."""
    return types.SimpleNamespace(args=args)


def test_repeated_requests_are_sampled_anew_and_the_same_again_tomorrow(evaluator):
    from llm_jax.evaluation.harness import HarnessModel

    sampled, greedy = ({"temperature": t, "do_sample": bool(t), "max_gen_toks": 8} for t in (1.0, 0.0))
    four = HarnessModel(evaluator).generate_until([asked("the rain", sampled)] * 4)
    assert len(set(four)) == 4
    assert HarnessModel(evaluator).generate_until([asked("the rain", sampled)] * 2) == four[:2]
    assert len(set(HarnessModel(evaluator).generate_until([asked("the rain", greedy)] * 2))) == 1


def test_text_is_asked_as_text_after_a_chat(opened):
    from llm_jax.evaluation.harness import HarnessModel
    from llm_jax.evaluation.runner import Evaluator

    begun = opened._replace(tokenizer=opened.tokenizer.begun(0))  # whose texts begin with a token
    model = HarnessModel(Evaluator(begun, slots=4))
    before = model.loglikelihood([asked("the rain", " in spain")])
    prompt = model.apply_chat_template([{"role": "user", "content": "the rain"}])
    assert model.loglikelihood([asked("the rain", " in spain")]) == before
    requests = [model._generate(text, {}) for text in (prompt, f"{prompt}in", "the rain")]
    assert [request.written for request in requests] == [True, True, False]


def test_a_model_without_a_template_refuses_chat(opened):
    import dataclasses

    from llm_jax.evaluation.harness import HarnessModel
    from llm_jax.evaluation.runner import Evaluator

    plain = dataclasses.replace(opened.tokenizer, chat_template=None)
    model = HarnessModel(Evaluator(opened._replace(tokenizer=plain)))
    with pytest.raises(UserError, match="tiny has no chat template: ask without one"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])
