"""Names of special tokens in conversations: what a template writes are tokens, what somebody said is text.

Whoever could say them could end a turn, and begin one as somebody else: a user, a page that a tool has read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BREAK = "\ufdd2"  # inside a name that was said; Unicode has it for such ends, and no text has it


class Names:
    """ids: those of special tokens, by name."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def broken(self, text: str) -> str:
        """What was said, its names broken, so that they are told from those that a template writes."""
        return self._any.sub(lambda name: name[0][:1] + BREAK + name[0][1:], text)

    def said(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages in which all names are broken."""
        return [
            {
                key: self.broken(value) if isinstance(value, str) and key != "role" else value
                for key, value in message.items()
            }
            for message in messages
        ]

    def text(self, written: str) -> str:
        """What is text in what a template has written."""
        return whole(self._any.sub("", written))

    def encode(self, written: str, codec: Any) -> np.ndarray:
        """Token ids of what a template has written, by a codec for which every name is text."""
        rows = codec.encode_batch([whole(part) for part in self._any.split(written)])
        found = [np.asarray(rows[0], np.int32)]
        for name, row in zip(self._any.findall(written), rows[1:], strict=True):
            found += [np.int32([self.ids[name]]), np.asarray(row, np.int32)]
        return np.concatenate(found)


def whole(text: str) -> str:
    """A text with its broken names as they were said."""
    return text.replace(BREAK, "")
