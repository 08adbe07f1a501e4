"""What a compiled program exchanges between devices, read from XLA's own text of it.

XLA's cost analysis counts the body of a loop once; here it is counted as often as the loop runs, which its
condition says (a counter below a constant, as scans are).
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16}
BITS |= {"bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)


class Exchange(NamedTuple):
    """A collective: its kind, the devices that take part, the bytes of its result on one, how often."""

    kind: str
    devices: int
    size_bytes: int
    times: int

    @property
    def received_bytes(self) -> float:
        """What one device receives, at the least, each time (Thakur et al. 2005; a ring reaches it)."""
        others = (self.devices - 1) / self.devices if self.devices else 0.0
        factor = {"all-reduce": 2 * others, "reduce-scatter": self.devices - 1, "collective-permute": 1.0}
        return self.size_bytes * factor.get(self.kind, others)


def collectives(text: str) -> dict[str, dict[str, float]]:
    """{kind: {"count": how often in a step, "bytes": what one device receives by it in a step}}."""
    found: dict[str, dict[str, float]] = {}
    for exchange in exchanges(text):
        entry = found.setdefault(exchange.kind, {"count": 0, "bytes": 0.0})
        entry["count"] += exchange.times
        entry["bytes"] += exchange.times * exchange.received_bytes
    return found


def exchanges(text: str) -> list[Exchange]:
    """All collectives of a program; the parts of an asynchronous one, a chain of one channel, count once."""
    computations, entry = _computations(text)
    by_channel: dict[Any, Exchange] = {}
    for number, (name, line, times) in enumerate(_executed(computations, entry, 1)):
        kind = _kind(line)
        if kind is None:
            continue
        operation = _OPERATION.match(line)
        size, devices = _size_bytes(operation[1], operation[2]), _group(line)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU's fusion with a slice
            kind, size = "reduce-scatter", size // max(devices, 1)
        chain = re.search(r"channel_id=(\d+),.*chain_id=\"(\d+)\"", line)
        key = chain.groups() if chain else number
        before = by_channel.get(key)
        if before is None or before.times < times:
            by_channel[key] = Exchange(kind, devices, size, times)
    return list(by_channel.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return computations, entry


def _executed(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, str, int]]:
    """(computation, line, how often it runs) of everything that `name` runs."""
    for line in computations.get(name, ()):
        yield name, line, times
        if called := _CALLED.search(line):
            often = times
            if condition := re.search(r"condition=%?([\w.\-]+)", line):
                often *= _length(computations[condition[1]])
                called = re.search(r"body=(%?[\w.\-]+)", line)
            for inner in called[1].split(", "):
                yield from _executed(computations, inner.lstrip("%"), often)


def _length(condition: list[str]) -> int:
    """How often a loop runs: the constant that its counter stays below."""
    numbers = [int(n) for line in condition for n in re.findall(r"s32\[\][^=]* constant\((\d+)\)", line)]
    return max(numbers, default=1)


def _kind(line: str) -> str | None:
    operation = _OPERATION.match(line)
    if operation is None:
        return None
    name = operation[2].removesuffix("-start")
    return name if name in KINDS else None


def _size_bytes(shape: str, operation: str) -> int:
    """Bytes of a result; what starts an asynchronous one has (operands, results, ...): half of its arrays."""
    sizes = [_bytes(*match) for match in _ARRAY.findall(shape)]
    if operation.endswith("-start") and len(sizes) > 1:
        return max(sizes)
    return sum(sizes)


def _bytes(dtype: str, dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(dtype, 0) // 8


def _group(line: str) -> int:
    """How many devices take part in one exchange."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return 2
