"""Tokenizers in the metadata of GGUF files: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama")."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llm_jax.config import UserError
from llm_jax.interop.tokenizer import SPACE, Portable, begin, spell

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}

STOPS = ("eos", "eot", "eom")  # the ids at which an answer ends


class Pre(NamedTuple):
    """How a byte-level tokenizer takes a text apart before it merges: a tokenizer.ggml.pre.

    also: other names of it. patterns: cut by these in turn, by default as GPT-2. digits: each alone. whole: a
    piece that is a token isn't merged. begins: texts begin with bos if the file doesn't say. composed: to NFC
    first, which llama.cpp leaves out.
    """

    also: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    begins: bool = False
    composed: bool = False

    def cut(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_FIRST}\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = rf"{_CASES}|\p{{N}}|{_SIGNS.replace('n]', 'n/]')}|{_SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRES = {
    "gpt-2": Pre(also=("phi-2",)),
    "olmo": Pre(also=("mpt",), composed=True),
    "smollm": Pre(also=("starcoder", "refact", "codeshell"), digits=True),
    "llama-bpe": Pre(("llama3", "llama-v3", "falcon3"), (_LLAMA3,), whole=True, begins=True),
    "dbrx": Pre(("smaug-bpe",), (_LLAMA3,)),
    "qwen2": Pre(("deepseek-r1-qwen", "megrez"), (_QWEN2,), composed=True),
    "tekken": Pre((), (_TEKKEN,), whole=True, begins=True),
    "default": Pre((), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def _named(facts: Mapping[str, Any]) -> Pre:
    """The pre of a file; llama.cpp takes `default` where there is none."""
    name = facts.get("tokenizer.ggml.pre", "default")
    for known, pre in PRES.items():
        if name == known or name in pre.also:
            return pre
    raise UserError(f"tokenizer.ggml.pre={name!r} is not known here; there are: {', '.join(PRES)}")


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
    begins = model == "llama" or _named(facts).begins
    if facts.get("tokenizer.ggml.add_bos_token", begins) and ids["bos_token"] is not None:
        begin(tokenizer, ids["bos_token"])
    stops = [facts.get(f"tokenizer.ggml.{key}_token_id") for key in STOPS]
    stops = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    template = facts.get("tokenizer.chat_template")
    return Portable(tokenizer.to_str(), special, stops, template, context)


def _byte_level(facts: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    pre = _named(facts)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in facts.get("tokenizer.ggml.merges", [])]
    merges = [merge for merge in merges if "".join(merge) in vocabulary]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.whole))
    if pre.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.cut(), decoders.ByteLevel()
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
    if len(tokenizer.stops) > len(STOPS):
        raise UserError(f"a GGUF file has room for {len(STOPS)} ids that end an answer: {tokenizer.stops}")
    said |= {
        f"tokenizer.ggml.{key}_token_id": stop for key, stop in zip(STOPS, tokenizer.stops, strict=False)
    }
    if tokenizer.chat_template:
        said["tokenizer.chat_template"] = tokenizer.chat_template
    return said


def _begins(tokenizer: Portable) -> bool:
    """Whether texts begin with bos."""
    return tokenizer.encode("a").tolist()[:1] == [tokenizer.id_of("bos_token")]


def _scores(facts: dict[str, Any], names: list[str], merges: list[list[str]]) -> list[float]:
    """The earlier a merge, the higher the score of what it makes."""
    before = [*_steps(facts["normalizer"], "normalizers"), *_steps(facts["pre_tokenizer"], "pretokenizers")]
    if any(one["type"] == "Prepend" or one.get("prepend_scheme", "never") != "never" for one in before):
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
    whole, before = facts["model"].get("ignore_merges", False), _steps(facts["normalizer"], "normalizers")
    fitting = []
    for name, pre in PRES.items():
        probe = tokenizers.Tokenizer(models.BPE())
        probe.pre_tokenizer = pre.cut()
        same = _plain(json.loads(probe.to_str())["pre_tokenizer"]) == _plain(facts["pre_tokenizer"])
        if same and pre.whole == whole and before in ([], [{"type": "NFC"}]):
            fitting.append((pre.composed != bool(before), name))
    if fitting:
        return min(fitting)[1]
    raise UserError(f"llama.cpp has no name for how this tokenizer cuts text; known are {', '.join(PRES)}")


def _plain(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer without what changes no token."""
    steps = _steps(step, "pretokenizers")
    return [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]


def _steps(step: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer.json, which may be none, one or several."""
    return step.get(several, [step]) if step else []
