"""Conversations as token ids: a chat template, whose special tokens follow those of a tokenizer.

Prompts and answers are encoded piece by piece, as a model meets them: a prompt is encoded before its answer
is there, so no token may reach over the boundary. Names of special tokens in what somebody said are text.
"""

import re
from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.data.conversations import Conversation, UnusableError
from llm_jax.data.templates import Template, pieces
from llm_jax.data.tokenizers import Codec

EOS = "<|endoftext|>"  # what a template writes for the tokenizer's eot


class Encoded(NamedTuple):
    """Token ids [tokens], which of them the assistant says [tokens], and how many bytes of text those are."""

    tokens: np.ndarray
    said: np.ndarray
    bytes: int


class Writer:
    """Conversations as token ids: a tokenizer and a template; special tokens that are new follow its own."""

    def __init__(self, codec: Codec, template: Template) -> None:
        self.codec, self.template = codec, template
        self.ids = {name: number for name in template.special if (number := codec.id_of(name)) is not None}
        new = [name for name in template.special if name not in self.ids]
        self.ids |= {name: codec.vocabulary + number for number, name in enumerate(new)}
        self.vocabulary = codec.vocabulary + len(new)
        self.ids.setdefault(EOS, codec.eot)
        self._names = re.compile("|".join(map(re.escape, self.ids)))
        first = template.special[0] if "bos_token" in template.text else EOS
        self._special = {"bos_token": first, "eos_token": EOS, **template.roles}

    def encode(self, messages: Conversation) -> list[Encoded]:
        """Its pieces in order; raises UnusableError where the template refuses it."""
        mark = next(
            chr(sign)
            for sign in range(0xE000, 0xF900)
            if not any(chr(sign) in m["content"] for m in messages)
        )
        defused = [
            {
                **message,
                "content": self._names.sub(lambda name: name[0][0] + mark + name[0][1:], message["content"]),
            }
            for message in messages
        ]
        try:
            texts = pieces(self.template.text, defused, self._special, tuple(self.ids))
        except UserError as error:
            raise UnusableError(str(error)) from None
        return [self._piece(text, said, mark) for text, said in texts]

    def _piece(self, text: str, said: bool, mark: str) -> Encoded:
        names = self._names.findall(text)
        plain = [part.replace(mark, "") for part in self._names.split(text)]
        rows = self.codec.encode_batch(plain)
        ids = [rows[0].astype(np.int32)]
        for name, row in zip(names, rows[1:], strict=True):
            ids += [np.int32([self.ids[name]]), row.astype(np.int32)]
        tokens = np.concatenate(ids)
        return Encoded(tokens, np.full(len(tokens), said), said * sum(len(part.encode()) for part in plain))
