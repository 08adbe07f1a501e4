"""Conversations as rows: whole ones packed side by side, and only what the assistant says is trained on.

A row holds conversations that don't see each other (segment ids, positions from 0 in each).
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llm_jax.config import UserError, nearest, outside_identity
from llm_jax.data import readers, templates
from llm_jax.data.cache import digest
from llm_jax.data.catalogue import hash_of, split
from llm_jax.data.conversations import Found, read
from llm_jax.data.sources import Batch, DataConfig, HeldOut, Source
from llm_jax.data.templates import BUILT_IN, Template
from llm_jax.data.tokenizers import Bytes, Codec, Tokenizer
from llm_jax.data.turns import UnusableError
from llm_jax.data.windows import mix, shuffled
from llm_jax.data.writer import Encoded, Writer
from llm_jax.values import check_least

OWN = "own"  # the template that came with the tokenizer


@dataclasses.dataclass(frozen=True)
class Chat(DataConfig, kind="chat"):
    """Conversations to be continued by the assistant: rows of `sequence_length` tokens with their targets.

    paths: files of conversations (conversations.py). template: chatml, llama3, plain, a .jinja file, or
    own, which came with the tokenizer.
    too_long: a conversation longer than a row is cut behind its last answer that fits, or dropped; either is
    counted in the record.
    """

    paths: tuple[str, ...] = outside_identity(())
    form: str = "auto"
    template: str = "chatml"
    tokenizer: Tokenizer = Bytes()
    sequence_length: int = 512
    batch_size: int = 8
    too_long: Literal["cut", "drop"] = "cut"
    repeat: bool = False  # rows past the first epoch are given instead of refused
    held_out_fraction: float = 0.05

    @property
    def vocabulary(self) -> int:
        known = self.tokenizer.id_of
        return self.tokenizer.size() + sum(known(name) is None for name in self.written.special)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def written(self) -> Template:
        """The template; raises UserError where there is none of that name."""
        if self.template in BUILT_IN:
            return BUILT_IN[self.template]
        if self.template == OWN:
            if (own := self.tokenizer.template()) is None:
                raise UserError(f"data.template={OWN}: data.tokenizer has no chat template of its own")
            return own
        place = Path(self.template).expanduser()
        if place.suffix != ".jinja" or not place.is_file():
            hint = nearest(self.template, [*BUILT_IN, OWN, "a .jinja file"])
            raise UserError(f"no chat template {self.template!r}; {hint}")
        try:
            return self.tokenizer.named(readers.whole(place))
        except UserError as error:
            raise UserError(f"data.template={self.template}: {error}") from None

    def validate(self) -> None:
        check_least(self, "data.", sequence_length=2, batch_size=1)
        if not self.paths:
            raise UserError("data.paths is (); name files of conversations: --config.data.paths=chats.jsonl,")
        if not 0 <= self.held_out_fraction <= 0.5:
            raise UserError(f"data.held_out_fraction is {self.held_out_fraction}; it lies between 0 and 0.5")
        templates.check(self.written.text)
        if not self.written.end:
            raise UserError(
                f"data.template={self.template} ends an answer by no special token, so a model would never "
                "stop: write eos_token or <|a_name|> behind it (inside {% generation %}, where that stands)"
            )

    def fingerprint(self) -> dict[str, Any]:
        """The conversations and the template, wherever they lie."""
        content = [hash_of(readers.unpacked(Path(path))) for path in self.paths]
        text, special, end, _ = self.written
        file = self.tokenizer.content()
        own = {"tokenizer_content": file} if file else {}
        return {"content": content, "template": digest([text, special, end])} | own

    def open(self) -> "ChatSource":
        self.validate()
        found = read(self.paths, self.form)

        def texts(most_bytes: int) -> Iterator[str]:
            for messages in found.kept:
                yield "\n".join(message["content"] for message in messages)
                most_bytes -= sum(len(message["content"]) for message in messages)
                if most_bytes < 0:
                    return

        codec = self.tokenizer.open(texts, digest(self.fingerprint()["content"]))
        return ChatSource(self, Writer(codec, self.written), found)


class ChatSource(Source):
    """Rows of packed conversations; `writer` encodes them."""

    def __init__(self, config: Chat, writer: Writer, found: Found) -> None:
        self.config, self.writer = config, writer
        self.dropped, self.cut, kept = found.dropped, 0, []
        hashes: list[int] = []
        for messages, place in zip(found.kept, found.places, strict=True):
            try:
                encoded = self._fitting(writer.encode(messages))
            except UnusableError as error:
                self.dropped.add(error, place)
                continue
            kept.append(encoded)
            hashes.append(hash_of("\0".join(f"{m['role']}\0{m['content']}" for m in messages).encode()))
        if not kept:
            raise UserError(
                "no conversation is left for rows of data.sequence_length="
                f"{config.sequence_length}: {self.dropped}"
            )
        sizes = np.array([item.bytes for item in kept])
        held, train = split(np.array(hashes, np.uint64), sizes, config.held_out_fraction, 1 << 62, "chat")
        self._held, self._kept = [kept[number] for number in held], [kept[number] for number in train]
        self._rows = packed([len(item.tokens) - 1 for item in self._kept], config.sequence_length)
        rows = len(self._rows)
        if rows < config.batch_size:
            raise UserError(
                f"{len(self._kept)} conversations fill {rows} rows of {config.sequence_length}, and a batch "
                f"takes {config.batch_size}: give more, or lower --config.data.batch_size"
            )
        self.available_tokens = None if config.repeat else rows * config.sequence_length

    def _fitting(self, parts: list[Encoded]) -> Encoded:
        """The whole conversation, or what of it fits, as the config says; UnusableError if nothing does."""
        ends = np.cumsum([len(part.tokens) for part in parts])
        room = self.config.sequence_length + 1
        if ends[-1] > room:
            last = max(
                (i for i, part in enumerate(parts) if part.said.any() and ends[i] <= room), default=None
            )
            if last is None or self.config.too_long == "drop":
                raise UnusableError(
                    f"more than {room} tokens" + (" up to the first answer" if last is None else "")
                )
            parts, self.cut = parts[: last + 1], self.cut + 1
        return Encoded(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.said for part in parts]),
            sum(part.bytes for part in parts),
        )

    @property
    def codec(self) -> Codec:
        return self.writer.codec

    @functools.cached_property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.batch_size, self.config.sequence_length)
        names = ("tokens", "targets", "segments", "positions")
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names} | {
            "mask": jax.ShapeDtypeStruct(shape, np.float32)
        }

    def rows(self, seed: int, indices: np.ndarray) -> Batch:
        """As `Text` has them; the mask is 1 where the assistant says the target."""
        indices = np.asarray(indices, np.int64)
        count = np.full(len(indices), len(self._rows))
        epoch, place = np.divmod(indices, count)
        if epoch.any() and not self.config.repeat:
            raise UserError(
                f"row {indices[int(np.argmax(epoch > 0))]} lies past the first epoch: train on at most "
                f"{self.available_tokens:,} tokens, or set --config.data.repeat=true"
            )
        key = mix(np.full(len(indices), np.uint64(seed % (1 << 64))) + epoch.astype(np.uint64))
        chosen = shuffled(place, count, key)
        return self._batch([[self._kept[number] for number in self._rows[row]] for row in chosen])

    def held_out(self) -> HeldOut | None:
        if not self._held:
            return None
        order = packed([len(item.tokens) - 1 for item in self._held], self.config.sequence_length)

        def rows(indices: np.ndarray) -> Batch:
            chosen = [order[index] if index < len(order) else [] for index in indices]
            batch = self._batch([[self._held[number] for number in row] for row in chosen])
            document = np.zeros(batch["tokens"].shape, np.int32)
            for into, row in zip(document, chosen, strict=True):
                lengths = [len(self._held[number].tokens) - 1 for number in row]
                into[: sum(lengths)] = np.repeat(row, lengths)
            return batch | {"document": document}

        targets = sum(int(item.said[1:].sum()) for item in self._held)
        return HeldOut(rows, len(order), targets, sum(item.bytes for item in self._held), len(self._held))

    def epochs(self, rows: int) -> dict[str, float]:
        return {"conversations": rows / len(self._rows)}

    @property
    def notes(self) -> tuple[str, ...]:
        """How many conversations are trained on and held out, and how many were dropped and cut, and why."""
        why = f": {self.dropped}" if self.dropped else ""
        counts = f"{len(self._kept):,} conversations, {len(self._held):,} more held out, {self.cut:,} cut"
        return (f"{counts}, {self.dropped.total():,} dropped{why}",)

    @property
    def record(self) -> dict[str, Any]:
        codec, length = self.codec, self.config.sequence_length
        filled = sum(len(item.tokens) - 1 for item in self._kept)
        said = sum(int(item.said[1:].sum()) for item in self._kept)
        tokenizer = {"kind": self.config.tokenizer.kind, "vocabulary": self.writer.vocabulary}
        tokenizer |= {"fingerprint": codec.fingerprint, "library": codec.library}
        return {
            "conversations": {"trained": len(self._kept), "held_out": len(self._held), "cut": self.cut},
            "dropped": dict(self.dropped),
            "rows": len(self._rows),
            "filled": filled / (len(self._rows) * length),
            "trained_tokens": said,
            "tokenizer": tokenizer,
            "template": {"special": list(self.writer.template.special), "ends": self.writer.template.end},
        }

    def _batch(self, rows: Sequence[Sequence[Encoded]]) -> Batch:
        """Rows of conversations side by side."""
        shape = (len(rows), self.config.sequence_length)
        out = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")}
        out["mask"] = np.zeros(shape, np.float32)
        for number, row in enumerate(rows):
            start = 0
            for segment, item in enumerate(row, 1):
                place = number, slice(start, start + len(item.tokens) - 1)
                out["tokens"][place], out["targets"][place] = item.tokens[:-1], item.tokens[1:]
                out["mask"][place], out["segments"][place] = item.said[1:], segment
                out["positions"][place] = np.arange(len(item.tokens) - 1)
                start += len(item.tokens) - 1
        return out


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items share a row of `room`: the longest first, each into the row that it fills best."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        at = bisect.bisect_left(free, (lengths[item], -1))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (left - lengths[item], row))
    return rows
