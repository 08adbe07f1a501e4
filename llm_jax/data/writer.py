"""Conversations as token ids: a chat template, whose special tokens follow those of a tokenizer.

Prompts and answers are encoded piece by piece, as a model meets them: a prompt is encoded before its answer
is there, so no token may reach over the boundary. Names of special tokens in what somebody said are text.
"""

from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.data.conversations import Conversation
from llm_jax.data.names import Names
from llm_jax.data.templates import EOS, Template, pieces
from llm_jax.data.tokenizers import Codec
from llm_jax.data.turns import UnusableError


class Encoded(NamedTuple):
    """Token ids [tokens], which of them the assistant says [tokens], and how many bytes of text those are."""

    tokens: np.ndarray
    said: np.ndarray
    bytes: int


class Writer:
    """Conversations as token ids: a tokenizer and a template; special tokens that are new follow its own.

    Raises UserError where new ones would have other ids in a file of the tokenizer.
    """

    def __init__(self, codec: Codec, template: Template) -> None:
        self.codec, self.template = codec, template
        self.ids = {name: number for name in template.special if (number := codec.id_of(name)) is not None}
        new = [name for name in template.special if name not in self.ids]
        if new and codec.holes:
            raise UserError(
                f"data.tokenizer has ids without a token, so {new[0]} would have another id elsewhere than "
                "here: --config.data.template=plain has no token of its own"
            )
        self.ids |= {name: codec.vocabulary + number for number, name in enumerate(new)}
        self.vocabulary = codec.vocabulary + len(new)
        self.ids.setdefault(EOS, codec.eot)
        self._names = Names(self.ids)
        self._special = {"bos_token": EOS, "eos_token": EOS, **template.roles}

    def encode(self, messages: Conversation) -> list[Encoded]:
        """Its pieces in order; raises UnusableError where the template refuses it."""
        said = self._names.said(messages)
        try:
            texts = pieces(self.template.text, said, self._special, tuple(self.ids))
        except UserError as error:
            raise UnusableError(str(error)) from None
        if not any(spoken for _, spoken in texts):
            raise UnusableError("nothing that the template has the assistant say")
        return [self._piece(text, spoken) for text, spoken in texts]

    def _piece(self, text: str, said: bool) -> Encoded:
        tokens = self._names.encode(text, self.codec)
        return Encoded(tokens, np.full(len(tokens), said), said * len(self._names.text(text).encode()))
