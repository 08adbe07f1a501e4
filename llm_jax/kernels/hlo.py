"""What a compiled program exchanges between devices, read from XLA's own text of it.

XLA's cost analysis counts the body of a loop once; here it is counted as often as the loop runs, which the
loop says itself, or its condition (a counter below a constant, as scans are).

In programs for several TPU slices no collective leaves its slice. The compiler cuts those that would into
collectives inside and transfers through the hosts, `send` and `recv`, that say which collective of the slices
they are part of.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

VERSION = 2  # of what is read here; what is kept of it is kept by version

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # bf16[8,128], f8e4m3fn[8], pred[]
_CALLED = re.compile(
    r"(?:calls|to_apply|body|(?:branch|called|true|false)_computations?)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)
_TRANSFER = re.compile(r" recv\(.*_xla_megascale_target=(.*?),_xla_megascale_transfer_type=\"(\w+)\"")


class Exchange(NamedTuple):
    """A collective: its kind, how many take part, the bytes of its result on a device, how often it runs.

    between_slices: over the data centre's network, and those that take part are slices; else devices.
    """

    kind: str
    members: int
    size_bytes: int
    times: int
    between_slices: bool = False

    @property
    def received_bytes(self) -> float:
        """What one device receives, at the least, each time, and what it sends as well.

        Of n members with a result of S bytes each: S (n - 1) / n for an all-gather and an all-to-all (a
        ragged one as if its buffer were full), 2 S (n - 1) / n for an all-reduce, S (n - 1) for a
        reduce-scatter, S for a collective-permute. Thakur et al. 2005; a ring reaches it.
        """
        others = (self.members - 1) / self.members
        factor = {"all-reduce": 2 * others, "reduce-scatter": self.members - 1, "collective-permute": 1.0}
        return self.size_bytes * factor.get(self.kind, others)


def collectives(text: str, between_slices: bool = False) -> dict[str, dict[str, float]]:
    """{kind: {"count": how often in a step, "bytes": what one device receives by it in a step}}.

    Of what stays inside a slice, or of what goes between slices.
    """
    found: dict[str, dict[str, float]] = {}
    for exchange in exchanges(text):
        if exchange.between_slices == between_slices:
            entry = found.setdefault(exchange.kind, {"count": 0, "bytes": 0.0})
            entry["count"] += exchange.times
            entry["bytes"] += exchange.times * exchange.received_bytes
    return found


def exchanges(text: str) -> list[Exchange]:
    """All collectives of a program; the parts of an asynchronous one, a chain of one channel, count once."""
    computations, entry = _computations(text)
    sizes = re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])
    everyone = math.prod(map(int, sizes))
    by_channel: dict[Any, Exchange] = {}
    for number, (name, line, times) in enumerate(_executed(computations, entry, 1)):
        found = _transfer(line, times) or _collective(line, times, everyone)
        if found is None:
            continue
        if found.kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU fuses the cutting
            found = found._replace(kind="reduce-scatter", size_bytes=found.size_bytes // found.members)
        chain = re.search(r"channel_id=(\d+),.*chain_id=\"(\d+)\"", line)
        key = chain.groups() if chain else number
        before = by_channel.get(key)
        if before is None or before.times < times:
            by_channel[key] = found
    return list(by_channel.values())


def _collective(line: str, times: int, everyone: int) -> Exchange | None:
    """The collective that a line runs or starts; None where it doesn't, or ends one."""
    operation = _OPERATION.match(line)
    kind = operation[2].removesuffix("-start") if operation else None
    if kind not in KINDS:
        return None
    shape = operation[1]
    if operation[2].endswith("-start") and kind != "all-reduce":  # (operands, results, what else it needs)
        shape = _elements(shape)[1]
    return Exchange(kind, _members(line, everyone), _bytes(shape), times)


def _transfer(line: str, times: int) -> Exchange | None:
    """The part that a line takes in a collective of slices, by the network of the data centre."""
    found = _TRANSFER.search(line)
    if found is None:
        return None
    target, kind = found[1], found[2].lower().replace("_", "-")
    if kind == "one-to-one":
        kind, slices = "collective-permute", 2
    elif listed := re.match(r'"\{([\d,:]+)\}x', target):  # all devices of these slices
        bounds = [list(map(int, part.split(":"))) for part in listed[1].split(",")]
        slices = sum(part[-1] - part[0] + 1 for part in bounds)
    else:  # groups of devices: slice 3 has 300000, 300001, ...
        slices = len({int(one) // 100_000 for one in re.search(r"[\d,]+", target)[0].split(",")})
    return Exchange(kind, slices, _bytes(_elements(_OPERATION.match(line)[1])[0]), times, between_slices=True)


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
        often = times
        if condition := re.search(r"condition=%?([\w.\-]+)", line):
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            often *= int(known[1]) if known else _length(computations[condition[1]])
        for called in _CALLED.findall(line):
            for inner in re.findall(r"[\w.\-]+", called):
                yield from _executed(computations, inner, often)


def _length(condition: list[str]) -> int:
    """How often a loop runs: the constant that its counter stays below."""
    numbers = [int(n) for line in condition for n in re.findall(r"s32\[\][^=]* constant\((\d+)\)", line)]
    return max(numbers, default=1)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    depth, found = 0, [""]
    for letter in shape[1:-1]:
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def _bytes(shape: str) -> int:
    """Of all arrays in a shape; a pred has a byte, a token none."""
    sizes = {"pred": 8, "token": 0, "opaque": 0}
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * int(bits or sizes[kind]) // 8
        for kind, bits, dims in _ARRAY.findall(shape)
    )


def _members(line: str, everyone: int) -> int:
    """How many devices take part in one exchange (a group's, as all are of one size; empty: everyone)."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a', or a part of it, 'a':(2)4
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return everyone
