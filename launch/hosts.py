"""A place of several hosts, which train one run at a time together: a slice of TPUs, some nodes of a cluster.

All hosts start the same command. Host 0 leads: it plans and has the pool, of one worker. The others follow:
each connects to host 0, and starts, feeds and ends a worker of its own as it is told there. The workers meet
by jax.distributed, each time anew. What the leader says is a JSON line, as are the answers:

    {"start": address}                a worker, in the place of any before it; where all of them meet
    {"task": {...}}, {"stop": true}   what to train, with all others; to save and end
    {"end": code}                     the place is done, and this command ends with this code
    {"host": number}                  the follower's first line
    {"refused": reason}               it can have no worker there: a UserError, which ends the place with 2
    {"died": cause, "of": address}    its worker, that of so many that were to meet there
    {"asked": true}                   the follower has been told to end: all save, and all end

A leader that is done waits for hosts that have not come yet, to tell them so. A host that has gone ends the
whole place, with AGAIN: whoever started it starts it again, and what was trained goes on from its
checkpoints. One that never came ends it with 1, a failure, or it would be waited for again and again. One
whose worker alone has died gets another, as do all others with it.

Anybody may connect to the leader's port, or have taken it before. So both ends first show that they know the
place's secret (distributed.SECRET), which isn't sent itself; who doesn't is neither obeyed nor told anything.
Where there is none, as in what is started by hand, all know it.
"""

import contextlib
import hmac
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch import sweep
from launch.processes import SECONDS_TO_STOP, Share, Worker, gpus
from llm_jax import distributed, files
from llm_jax.config import UserError
from llm_jax.distributed import Place
from llm_jax.values import AGAIN

SECONDS_TO_COME = 900.0  # hosts of a place may be started one after the other
SECONDS_TO_ANSWER = 10.0  # who doesn't is a stranger
# Of a connection to a host that has vanished, which says nothing, not even goodbye; where a system has it.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 90_000}


def share(place: Place) -> Share:
    """What of its host the worker of such a place gets: all that the place has of it.

    Raises UserError where the host has fewer GPUs than tasks.
    """
    if place.devices is None or not (names := gpus()):
        return Share()
    if max(place.devices) >= len(names):
        raise UserError(
            f"no GPU for task {max(place.devices)} of this node, which are counted from 0: each takes one of "
            f"its {len(names)}, so --ntasks-per-node={len(names)}"
        )
    return Share(environment=(("CUDA_VISIBLE_DEVICES", ",".join(names[n] for n in place.devices)),))


def _variables(place: Place, address: str) -> dict[str, str]:
    """What a host's worker is told, of a place whose workers meet at `address`."""
    meeting = place._replace(coordinator=address)
    return distributed.variables(meeting) | {distributed.LAUNCHER: ""}  # it sees the end of its input


def _secret() -> bytes:
    return os.environ.get(distributed.SECRET, "").encode()


def _knows(connected: socket.socket, secret: bytes, mine: str, other: str) -> bool:
    """Whether the `other` end of a connection knows the secret, as it is shown there that `mine` does.

    Raises OSError where it says nothing.
    """

    def proof(who: str, challenge: bytes) -> bytes:
        return hmac.digest(secret, who.encode() + challenge, "sha256")

    connected.settimeout(SECONDS_TO_ANSWER)
    challenge = os.urandom(32)
    connected.sendall(challenge)
    connected.sendall(proof(mine, connected.recv(32)))
    return hmac.compare_digest(connected.recv(32), proof(other, challenge))


class Link:
    """Lines of JSON between two hosts. who: what to call the other one; open: whether it is there."""

    def __init__(self, connected: socket.socket, who: str) -> None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connected.settimeout(None)
        self.socket, self.who, self.open = connected, who, True
        self._unread = b""

    def say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # who has gone is found by `messages`
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What has come since the last call; waits for it."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        self.open = bool(data)
        *lines, self._unread = (self._unread + data).split(b"\n")
        try:
            yield from map(json.loads, lines)
        except ValueError:  # something else speaks there
            self.open = False


# ---- host 0 ----


class Followers:
    """The other hosts, as host 0 sees them. stops: once this is true, no host is waited for."""

    def __init__(self, place: Place, stops: Callable[[], bool] = lambda: False) -> None:
        self._place, self._host = place, place.coordinator.rpartition(":")[0]
        self._links: dict[int, Link] = {}
        self._news = threading.Condition()
        self._address, self._death, self._asked = "", "", False
        self._over: tuple[int, str] | None = None  # with which code the place ends, and why
        self._begun, self._code, self._stops, self._secret = time.monotonic(), 0, stops, _secret()
        self.ended = False
        port = int(place.coordinator.rpartition(":")[2])
        try:
            self._server = socket.create_server(("", port), backlog=place.processes)
        except OSError as error:
            raise UserError(
                f"port {port} of host 0, at which its place meets: {error.strerror}; choose another "
                f"by --coordinator={self._host}:PORT on every host"
            ) from None
        threading.Thread(target=self._greet, daemon=True).start()

    def begin(self) -> dict[str, str]:
        """Starts their workers, when all hosts are here; the environment variables of host 0's own."""
        with self._news:
            deadline = time.monotonic() + SECONDS_TO_COME
            while absent := self._absent():
                if time.monotonic() > deadline:
                    self._ends(1, f"after {SECONDS_TO_COME:.0f} s without {', '.join(absent)}")
                self.check()
                self._news.wait(1.0)
                if self._stops():
                    raise KeyboardInterrupt
        self.check()
        port = distributed.address().rpartition(":")[2]
        self._address, self._death = f"{self._host}:{port}", ""
        self.say(start=self._address)
        return _variables(self._place, self._address)

    def say(self, **message: Any) -> None:
        for link in self._links.values():
            link.say(**message)

    def death(self, seconds: float = 0.0) -> str:
        """Why the first of their workers to die has died; "" if all live, as far as is known so soon."""
        with self._news:
            self._news.wait_for(lambda: self._death or self._over, seconds)
            return self._death

    def check(self) -> None:
        """Raises SystemExit, with a line, where the place is not whole any more; AGAIN if a host has gone.

        Where another host was told to end, so is this one, as by a signal. It is here that it is: this host
        may have got the signal too, and what ends saves, which a second one would cut short.
        """
        if self._over:
            code, why = self._over
            print(f"this place of {self._place.processes} hosts ends: {why}", file=sys.stderr)
            raise SystemExit(code)
        if self._asked:
            self._asked = False
            signal.raise_signal(signal.SIGTERM)

    def end(self, code: int) -> int:
        """Tells all to end as this host does; where that is well, those too that are still to come."""
        with self._news, contextlib.suppress(KeyboardInterrupt):
            self.ended, self._code = True, code
            self.say(end=code)
            if code == 0 and not (self._over or self._stops()) and (absent := self._absent()):
                print(f"all is done; {', '.join(absent)} will be told", flush=True)
                left = self._begun + SECONDS_TO_COME - time.monotonic()
                self._news.wait_for(lambda: not self._absent(), max(0.0, left))
        return code

    def _absent(self) -> list[str]:
        return [f"host {n}" for n in range(1, self._place.processes) if n not in self._links]

    def _ends(self, code: int, why: str) -> None:
        """The place does; what is found first is why."""
        self._over = self._over or (code, why)

    def _greet(self) -> None:
        while True:
            threading.Thread(target=self._listen, args=self._server.accept(), daemon=True).start()

    def _listen(self, connected: socket.socket, address: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            if _knows(connected, self._secret, "host 0", "another host"):
                return self._hear(Link(connected, f"the host at {address[0]}"))
        connected.close()

    def _hear(self, link: Link) -> None:
        known = False  # whoever isn't a host of this place says nothing here
        while link.open:
            for message in link.messages():
                with self._news:
                    match message:
                        case {"host": int(number)} if f"host {number}" in self._absent():
                            link.who, known = f"host {number}", True
                            self._links[number] = link
                            if self.ended:
                                link.say(end=self._code)
                        case {"died": cause, "of": self._address} if known and not self._death:
                            self._death = f"{link.who}: {cause}"
                        case {"refused": reason} if known:
                            self._ends(2, f"{link.who}: {reason}")
                        case {"asked": True} if known:
                            self._asked = True
                    self._news.notify_all()
        with self._news:
            if known and not self.ended:
                self._ends(AGAIN, f"{link.who} has gone")
            self._news.notify_all()


@contextlib.contextmanager
def leading(place: Place, stops: Callable[[], bool] = lambda: False) -> Iterator[Followers]:
    """The other hosts of a place that this one leads; they end when it does, however that is."""
    distributed.end_with_launcher()
    others = Followers(place, stops)
    try:
        yield others
    except SystemExit as end:
        others.end(end.code)
        raise
    except (UserError, OSError):  # as the command ends
        others.end(2)
        raise
    finally:
        if not others.ended:
            others.end(1)


# ---- the others ----


def follow(place: Place, experiment: Path) -> int:
    """Does as host 0 of the place says, to the end; the exit code of all, or AGAIN where host 0 has gone.

    1 where it never came, which whoever starts this counts as a failure, or it would be so for ever.
    """
    distributed.end_with_launcher()
    who = f"host {place.process} of {place.processes}"
    try:
        link = _connected(place)
    except ConnectionError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 1
    link.say(host=place.process)
    patience = [float("inf")]

    def asked(*_: Any) -> None:
        if patience[0] == float("inf"):
            link.say(asked=True)
            patience[0] = time.monotonic() + SECONDS_TO_STOP

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked)
    try:
        code = Hand(link, place, experiment, patience).work()
    except UserError as error:
        link.say(refused=str(error))
        raise
    if code is None:
        print(f"{who}: {link.who} has gone, and with it this place", file=sys.stderr)
    return AGAIN if code is None else code


def _connected(place: Place) -> Link:
    """A link to host 0, which may come later, and whose name may come with it; raises ConnectionError."""
    host, _, port = place.coordinator.rpartition(":")
    deadline, there = time.monotonic() + SECONDS_TO_COME, "nobody"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            connected = socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER)
            if _knows(connected, _secret(), "another host", "host 0"):
                return Link(connected, "host 0")
            there = f"somebody without this place's {distributed.SECRET}"
            connected.close()
        time.sleep(1.0)
    raise ConnectionError(f"{there} at {place.coordinator}, which is host 0's")


class Hand:
    """What a follower has in its hand: the link, and its worker, if it has been told to start one."""

    def __init__(self, link: Link, place: Place, experiment: Path, patience: list[float]) -> None:
        self._link, self._experiment, self._share = link, experiment, share(place)
        self._place, self._patience = place, patience
        self._worker: Worker | None = None
        self._folder: Path | None = None  # of the run that it was last told to train
        self._selector = selectors.DefaultSelector()
        self._selector.register(link.socket, selectors.EVENT_READ, self._obey)

    def work(self) -> int | None:
        """Blocks until the leader says with which code to end, or has gone (None)."""
        code = None
        try:
            while code is None and self._link.open and time.monotonic() < self._patience[0]:
                for key, _ in self._selector.select(timeout=1.0):
                    code = key.data() if code is None else code
            return code
        finally:
            self._drop()

    def _obey(self) -> int | None:
        for message in self._link.messages():
            match message:
                case {"start": str(address)}:
                    self._drop(seconds=0.0)
                    told = _variables(self._place, address).items()
                    mine = Share(self._share.cores, (*self._share.environment, *told))
                    self._worker, self._folder, self._address = Worker(self._experiment, mine), None, address
                    self._selector.register(self._worker.pipe, selectors.EVENT_READ, self._hear)
                case {"task": task} if self._worker is not None:
                    self._folder = files.path(task["runs"][0]["folder"])
                    self._worker.send(task)
                case {"stop": True} if self._worker is not None:
                    self._worker.stop()
                case {"end": int(code)}:
                    return code
        return None

    def _hear(self) -> None:
        """What a follower's worker says the leader's says too, but that it has died."""
        for _ in self._worker.messages():
            pass
        if self._worker.closed:
            if self._worker.process.wait() != AGAIN:  # else it has lost another, which is the cause
                *_, last = ["", *self._worker.printed().splitlines()]
                cause = self._worker.cause_of_death() + (f" ({last[:200]})" if last else "")
                self._link.say(died=cause, of=self._address)
            self._drop()

    def _drop(self, seconds: float = SECONDS_TO_STOP) -> None:
        """Ends the worker, if there is one, which has so long to save."""
        if self._worker is not None:
            self._selector.unregister(self._worker.pipe)
            self._worker.stop()
            try:
                self._worker.wait(time.monotonic() + seconds)
                if self._folder is not None and files.in_bucket(self._folder):  # what it couldn't any more
                    sweep.add_to_log(self._folder, self._worker.printed(), self._place.process)
            finally:
                self._worker.end()
            self._worker = None
