"""Tokenizers in the metadata of GGUF files: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama")."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llm_jax.config import UserError
from llm_jax.interop.tokenizer import SPACE, Portable, begin, spell

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}

# How text is cut before merging, by tokenizer.ggml.pre. With a pattern, byte-level characters follow it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
PATTERNS = {"gpt-2": None, "smollm": None, "llama-bpe": _LLAMA3, "qwen2": _QWEN2, "dbrx": _LLAMA3}


def _cut(pre: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pattern := PATTERNS[pre]:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def read(facts: Mapping[str, Any], context: int | None) -> Portable | None:
    """The tokenizer that the metadata describe, if they do; raises UserError for a kind that isn't known."""
    model, tokens = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    kinds = facts.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if model == "gpt2":
        tokenizer = _byte_level(facts, tokens)
    elif model == "llama":
        scores, unknown = facts["tokenizer.ggml.scores"], facts.get("tokenizer.ggml.unknown_token_id", 0)
        prefix = facts.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = spell(list(zip(tokens, scores, strict=True)), unknown, bpe=True, prefix=prefix)
    else:
        raise UserError(f"tokenizer.ggml.model={model!r} is not known here; gpt2 and llama are")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            tokenizer.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)])
    ids = {role: facts.get(f"tokenizer.ggml.{key}_token_id") for key, role in ROLES.items()}
    special = {role: tokens[number] for role, number in ids.items() if number is not None}
    if facts.get("tokenizer.ggml.add_bos_token", model == "llama") and ids["bos_token"] is not None:
        begin(tokenizer, ids["bos_token"])
    stops = [ids["eos_token"], facts.get("tokenizer.ggml.eot_token_id")]
    stops = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    template = facts.get("tokenizer.chat_template")
    return Portable(tokenizer.to_str(), special, stops, template, context)


def _byte_level(facts: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    pre = facts.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PATTERNS:
        raise UserError(f"tokenizer.ggml.pre={pre!r} is not known here; there are: {', '.join(PATTERNS)}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in facts.get("tokenizer.ggml.merges", [])]
    merges = [merge for merge in merges if "".join(merge) in vocabulary]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = _cut(pre), decoders.ByteLevel()
    return tokenizer


def write(tokenizer: Portable, vocabulary: int) -> dict[str, Any]:
    """The metadata of a tokenizer with `vocabulary` ids; raises UserError for what llama.cpp hasn't."""
    facts = json.loads(tokenizer.data)
    model, added = facts["model"], {token["id"]: token for token in facts["added_tokens"]}
    if model["type"] != "BPE":
        raise UserError(f"a GGUF file holds a BPE tokenizer, and this is {model['type']}")
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    if max(tokens) >= vocabulary:
        raise UserError(f"the tokenizer has ids up to {max(tokens)}, and the model {vocabulary} of them")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    names = [tokens.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    spelled = model.get("byte_fallback", False)

    def kind(number: int) -> int:
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        byte = spelled and names[number].startswith("<0x")
        return UNUSED if number not in tokens else BYTE if byte else NORMAL

    said: dict[str, Any] = {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [kind(number) for number in range(vocabulary)],
        "tokenizer.ggml.add_bos_token": _begins(tokenizer),
        "tokenizer.ggml.add_space_prefix": False,
    }
    if spelled:
        said |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": _scores(facts, names, merges)}
    else:
        said |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(facts, bool(merges))}
        # llama.cpp wants some: one that makes no token does nothing.
        said["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges or [names[:1] * 2]]
    for key, role in ROLES.items():
        if (number := tokenizer.id_of(role)) is not None:
            said[f"tokenizer.ggml.{key}_token_id"] = number
    if tokenizer.stops:
        said["tokenizer.ggml.eos_token_id"] = tokenizer.stops[0]
    if tokenizer.chat_template:
        said["tokenizer.chat_template"] = tokenizer.chat_template
    return said


def _begins(tokenizer: Portable) -> bool:
    """Whether texts begin with bos."""
    return tokenizer.encode("a").tolist()[:1] == [tokenizer.id_of("bos_token")]


def _scores(facts: dict[str, Any], names: list[str], merges: list[list[str]]) -> list[float]:
    """The earlier a merge, the higher the score of what it makes."""
    if any(step.get("type") == "Prepend" for step in (facts["normalizer"] or {}).get("normalizers", [])):
        raise UserError(
            f"a tokenizer that puts {SPACE!r} before each text reads special tokens otherwise there"
        )
    made: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        made.setdefault(left + right, -float(rank))
    return [made.get(name, -float(len(merges) + number)) for number, name in enumerate(names)]


def _pre(facts: dict[str, Any], merging: bool) -> str:
    """What llama.cpp calls the way that text is cut; without merges there is nothing to cut for."""
    if not merging:
        return "gpt-2"
    for pre in PATTERNS:
        probe = tokenizers.Tokenizer(models.BPE())
        probe.pre_tokenizer = _cut(pre)
        if _plain(json.loads(probe.to_str())["pre_tokenizer"]) == _plain(facts["pre_tokenizer"]):
            return pre
    raise UserError(
        f"llama.cpp has no name for how this tokenizer cuts text; known are {', '.join(PATTERNS)}"
    )


def _plain(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer without what changes no token."""
    steps = (step or {}).get("pretokenizers", [step or {}])
    return [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]
