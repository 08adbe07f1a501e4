"""A tokenizer as other tools keep it: a `tokenizer.json`, its special tokens, the chat template."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from llm_jax.config import UserError
from llm_jax.data.names import BREAK, Names
from llm_jax.data.templates import CLOSE, EOS, OPEN, TRANSCRIPT, Message, Template, named, render
from llm_jax.data.tokenizers import Bytes, HuggingFaceCodec, SentencePieceCodec

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
SPACE = "\u2581"  # SentencePiece's sign for a space


@dataclasses.dataclass(frozen=True)
class Portable:
    """A tokenizer that travels with a model.

    data: the text of its tokenizer.json, less what it says of cutting and padding texts; tokens around a call
    of a tool are text, which is read again, whatever it says. special: tokens by role (bos_token, eos_token,
    …). stops: ids at which an answer ends. context: how many tokens the model was made for.
    """

    data: str
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stops: tuple[int, ...] = ()
    chat_template: str | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.data)
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"not a tokenizer.json: {error}") from None
        added = tokenizer.get_added_tokens_decoder().values()
        hidden = any(token.special and token.content in (OPEN, CLOSE) for token in added)
        if tokenizer.truncation or tokenizer.padding or hidden:
            facts = json.loads(self.data) | {"truncation": None, "padding": None}
            for token in facts["added_tokens"]:
                token["special"] &= token["content"] not in (OPEN, CLOSE)
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(facts))
            object.__setattr__(self, "data", tokenizer.to_str())
        object.__setattr__(self, "_tokenizer", tokenizer)

    @property
    def vocabulary(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def vocabulary_of(self) -> dict[str, int]:
        """The id of every token, special ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def ids(self) -> int:
        """How many token ids there are, those without a token too."""
        return max(self.vocabulary_of().values()) + 1

    def beyond(self, vocabulary: int) -> int:
        """How many tokens of text are outside a vocabulary (some models have no place for special ones)."""
        return sum(number >= vocabulary for number in {*self.vocabulary_of().values()} - self.unwritten)

    @property
    def template(self) -> Template:
        """The chat template and the special tokens that it writes, by name or role."""
        return named(self.chat_template, tuple(self.names.ids), tuple(self.special.items()))

    def id_of(self, role: str) -> int | None:
        """The id of the special token in a role, such as eos_token."""
        token = self.special.get(role)
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """Token ids; names of special tokens in the text are they, `special` adds what a text begins with.

        Broken names (names.py) are text. Raises UserError for a text that was no UTF-8 where it came from.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) & 0xFF  # as Python keeps it
            place = f"byte 0x{byte:02x} behind {error.start} characters"
            raise UserError(f"the text is not UTF-8: {place}") from None
        if BREAK not in text:
            return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)
        begun = self._tokenizer.encode("", add_special_tokens=special).ids
        return np.concatenate([np.int32(begun), self.names.encode(text, self._of_text)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def begun(self, number: int) -> "Portable":
        """The same tokenizer, but that every text begins with the token `number`: bos, if there is none."""
        tokenizer = tokenizers.Tokenizer.from_str(self.data)
        begin(tokenizer, number)
        special = {"bos_token": tokenizer.id_to_token(number), **self.special}
        return dataclasses.replace(self, data=tokenizer.to_str(), special=special)

    def spelling(self, token: int) -> bytes:
        """The bytes that a token stands for inside a text, perhaps a part of a character; or a name's."""
        piece = self._tokenizer.id_to_token(token) or ""  # a padded vocabulary has more ids than pieces
        if token in self._named:
            return piece.encode()
        if self._byte_level and all(sign in _BYTES for sign in piece):
            return bytes(_BYTES[sign] for sign in piece)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace(SPACE, " ").encode()

    @functools.cached_property
    def _named(self) -> Mapping[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    @functools.cached_property
    def unwritten(self) -> frozenset[int]:
        """Special tokens, which `decode` leaves out."""
        return frozenset(number for number, token in self._named.items() if token.special)

    @functools.cached_property
    def names(self) -> Names:
        """Special tokens by name."""
        return Names({self._named[number].content: number for number in sorted(self.unwritten)})

    @functools.cached_property
    def _of_text(self) -> HuggingFaceCodec:
        """The same tokenizer, for which names of special tokens are text."""
        return HuggingFaceCodec(self.data.encode(), "tokenizer.json", None)

    @functools.cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.data).get("decoder"))

    def codec(self) -> HuggingFaceCodec:
        """The same tokenizer for data: eos is eot, and names of special tokens in a text are text."""
        return HuggingFaceCodec(self.data.encode(), "tokenizer.json", self.special.get("eos_token"))


def written(tokenizer: Portable | None, messages: Sequence[Message]) -> str:
    """A conversation to where the next answer begins, by the tokenizer's template, else as a transcript.

    Names of special tokens are broken in what was said, as they were in training.
    """
    if tokenizer is None:
        return render(TRANSCRIPT, messages, {})
    said = tokenizer.names.said(messages)
    return render(tokenizer.chat_template or TRANSCRIPT, said, tokenizer.special)


# ---- Hugging Face's files ----


def read(folder: pathlib.Path, context: int | None) -> Portable | None:
    """The tokenizer in a directory, if there is one; a SentencePiece `tokenizer.model` is converted."""
    facts = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    special = {role: _content(facts[role]) for role in ROLES if facts.get(role)}
    if (folder / "tokenizer.json").is_file():
        place = folder / "tokenizer.json"
        try:
            found = Portable(_text(place), special)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    elif (folder / "tokenizer.model").is_file():
        try:
            found = of_sentencepiece((folder / "tokenizer.model").read_bytes())
        except Exception as error:  # protobuf's own kinds, and whatever damaged numbers lead to
            raise UserError(f"{folder / 'tokenizer.model'}: not a SentencePiece model: {error}") from None
    else:
        return None
    generation = read_json(folder / "generation_config.json") or read_json(folder / "config.json")
    stops = generation.get("eos_token_id")
    stops = [found.id_of("eos_token")] if stops is None else stops if isinstance(stops, list) else [stops]
    template = facts.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = _text(folder / "chat_template.jinja")
    stops = tuple(stop for stop in stops if stop is not None)
    return dataclasses.replace(found, stops=stops, chat_template=template, context=context)


def write(tokenizer: Portable, folder: pathlib.Path) -> None:
    """The files that `read` and transformers read."""
    facts: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special}
    if tokenizer.context:
        facts["model_max_length"] = tokenizer.context
    if tokenizer.chat_template:
        facts["chat_template"] = tokenizer.chat_template  # for older readers
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
    (folder / "tokenizer.json").write_text(tokenizer.data)
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(tokenizer.special), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids(tokenizer), indent=2))


def ids(tokenizer: Portable | None) -> dict[str, Any]:
    """The keys of special ids in config.json and generation_config.json; null, or a reader takes its own."""
    if tokenizer is None:
        return {f"{role}_id": None for role in ROLES[:3]}
    stops = list(tokenizer.stops)
    said = {f"{role}_id": tokenizer.id_of(role) for role in ROLES[:3]}
    return said | ({"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {})


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none; raises UserError for anything else."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__}, and it should be an object of keys and values")
    return found


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def begin(tokenizer: tokenizers.Tokenizer, number: int) -> None:
    """Makes every text begin with the token `number`."""
    token = tokenizer.id_to_token(number)
    tokenizer.post_processor = processors.TemplateProcessing(f"{token} $A", special_tokens=[(token, number)])


# ---- from tokenizers of this house ----


def of(codec: Any) -> Portable:
    """The portable form of a codec of `data/tokenizers.py`; eot becomes the eos token."""
    if isinstance(codec, Portable):
        return codec
    if isinstance(codec, Bytes):
        return of_bytes()
    pieces = isinstance(codec, SentencePieceCodec)
    found = of_sentencepiece(codec.model) if pieces else Portable(codec.data)
    tokenizer = tokenizers.Tokenizer.from_str(found.data)
    name = tokenizer.id_to_token(codec.eot) or EOS
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    if tokenizer.token_to_id(name) != codec.eot:
        raise UserError(f"the tokenizer's ids have holes, so eot can't be {codec.eot} elsewhere: name one")
    return Portable(tokenizer.to_str(), {**found.special, "eos_token": name}, (codec.eot,))


def with_turns(tokenizer: Portable, template: Template) -> Portable:
    """The tokenizer with a chat template, whose special tokens follow its own ids.

    An answer ends with what the template ends it, and with the end of a text.
    """
    found = tokenizers.Tokenizer.from_str(tokenizer.data)
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in template.special])
    ends = [found.token_to_id(name) for name in template.special if name == template.end]
    return dataclasses.replace(
        tokenizer,
        data=found.to_str(),
        special={**tokenizer.special, **template.roles},
        stops=tuple(dict.fromkeys([*ends, *tokenizer.stops])),
        chat_template=template.text,
    )


def of_bytes() -> Portable:
    """Each byte a token, in the alphabet of byte-level BPE without merges."""
    signs = _byte_signs()
    tokenizer = tokenizers.Tokenizer(models.BPE({signs[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return Portable(tokenizer.to_str(), {"eos_token": EOS}, (Bytes.eot,))


def _byte_signs() -> list[str]:
    """The character that stands for each byte (GPT-2): itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTES = {sign: byte for byte, sign in enumerate(_byte_signs())}


def of_sentencepiece(model: bytes) -> Portable:
    """A SentencePiece model (BPE or unigram) as a tokenizer.json."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    parsed = proto.ModelProto.FromString(model)
    kinds, spec = proto.ModelProto.SentencePiece, parsed.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in parsed.pieces]
    tokenizer = spell(
        pieces, spec.unk_id, spec.model_type == spec.BPE, prefix=parsed.normalizer_spec.add_dummy_prefix
    )
    if charsmap := parsed.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), tokenizer.normalizer])
    named = [p for p in parsed.pieces if p.type in (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNKNOWN)]
    for piece in named:
        token = AddedToken(piece.piece, normalized=False, special=piece.type != kinds.USER_DEFINED)
        tokenizer.add_tokens([token])
    roles = {
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_id,
        "pad_token": spec.pad_id,
        "unk_token": spec.unk_id,
    }
    special = {role: parsed.pieces[number].piece for role, number in roles.items() if number >= 0}
    return Portable(tokenizer.to_str(), special, (spec.eos_id,) if spec.eos_id >= 0 else ())


def spell(pieces: list[tuple[str, float]], unknown: int, bpe: bool, prefix: bool) -> tokenizers.Tokenizer:
    """SentencePiece's pieces with their scores as a tokenizer that spells what it doesn't know in bytes."""
    if bpe:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        merges = []
        for piece, score in pieces:
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [(-score, *half) for half in halves if half[0] in vocabulary and half[1] in vocabulary]
        merges.sort(key=lambda merge: merge[0])  # the best first; equal ones in the order of pieces
        model = models.BPE(
            vocabulary,
            [(left, right) for _, left, right in merges],
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=True,
        )
    else:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    first = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer
