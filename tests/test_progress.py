import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from llm_jax import progress
from llm_jax.progress import Progress, Status, SweepProgress, clock


class Clock:
    """Stands in for time.monotonic."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_run_reports_a_few_times_a_second_and_its_last_step(time):
    sent = []
    reporter = Progress(1000, "run", sent.append)
    for step in range(1, 1001):
        time.now += 0.001
        reporter.update(step, 3.0, 41_000.0)
    assert sent[0] == Status("run", 0, 1000)
    assert [status.step for status in sent] == [0, 1, 201, 401, 601, 801, 1000]


def test_the_time_left_counts_the_steps_of_this_session_only(time):
    sent = []
    reporter = Progress(100, "run", sent.append)
    time.now += 50  # compiling
    reporter.update(40, 3.0, 1.0)  # restored at 39
    time.now += 10
    reporter.update(50, 3.0, 1.0)
    assert sent[-2].seconds_left is None and sent[-1].seconds_left == pytest.approx(50)


def test_a_run_that_begins_says_from_where_and_one_that_is_refused_says_nothing(capfd):
    for begins in (False, True):
        reporter = Progress(100, "run", headline="runs/x: 100 steps")
        if begins:
            reporter.begin(40, ["on 2 devices"])
        reporter.close()
        said = capfd.readouterr()
        line = "runs/x: 100 steps, continued from step 40\non 2 devices\n"
        assert (said.out, said.err) == ("", line if begins else "")


def test_a_run_goes_on_if_nobody_listens_any_more():
    reader, writer = os.pipe()
    os.close(reader)
    reporter = Progress(2, "run", lambda status: os.write(writer, b"x"))
    for step in (1, 2):
        reporter.update(step, 3.0, 1.0)
    reporter.close()
    os.close(writer)


def test_without_a_terminal_lines_are_printed_now_and_then(time):
    log = io.StringIO()
    sweep = SweepProgress({"a": 1.0, "b": 3.0}, log)
    for step in range(1, 101):
        time.now += 1
        sweep.show(Status("a", step, 100, 4 - step / 100, 41_000.0, 100.0 - step))
    sweep.end("a", "loss 3.0000 in 1:40")
    sweep.end("b", "crashed with exit code 3", good=False)
    sweep.close()
    text = log.getvalue()
    assert "\r" not in text and "\x1b" not in text
    assert "a: step 11/100, loss 3.8900, 41,000 tokens/s, 1:29 left\n" in text
    assert 9 <= text.count("\na: step") <= 12 and "a: step 100/100" in text
    assert "a: loss 3.0000 in 1:40\nsweep: 1/2 runs done, 1:40 elapsed, 5:00 left\n" in text
    last = "sweep: 1/2 runs done, 1 failed, 1:40 elapsed, 0:00 left\n"
    assert text.endswith(last) and text.count(last) == 1


def test_costs_weigh_the_runs_in_the_time_left(time):
    sweep = SweepProgress({"small": 1.0, "large": 9.0}, io.StringIO(), planned=6)
    time.now += 30
    sweep.show(Status("large", 1, 30))
    assert str(sweep) == "4/6 runs done, 0:30 elapsed, ? left"  # a few steps foretell nothing
    time.now -= 30
    sweep.show(Status("large", 1, 3))
    assert sweep.fraction == pytest.approx(0.3)
    time.now += 30
    assert str(sweep) == "4/6 runs done, 0:30 elapsed, 1:10 left"


def test_late_messages_of_a_run_that_ended_are_ignored(time):
    log = io.StringIO()
    sweep = SweepProgress({"a": 1.0}, log)
    sweep.end("a", "done")
    sweep.show(Status("a", 1, 10))
    assert sweep.fraction == 1.0 and "step" not in log.getvalue()


def screen(text, width=100):
    """What a terminal shows after `text`: carriage return, newline, cursor up."""
    grid, row, column = {}, 0, 0
    text = text.replace("\x1b[A", "\x0b")
    for character in text:
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
        elif character == "\x0b":
            row -= 1
        else:
            grid[row, column], column = character, column + 1
    rows = range(max(row for row, _ in grid) + 1)
    lines = ["".join(grid.get((row, column), " ") for column in range(width)).rstrip() for row in rows]
    return [line for line in lines if line]


@pytest.fixture
def terminal():
    """A terminal's stream, and a function that says what is on its screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    os.set_blocking(ours, False)
    stream, shown = os.fdopen(theirs, "w"), []

    def look():
        stream.flush()
        while True:
            try:
                shown.append(os.read(ours, 1 << 16).decode())
            except BlockingIOError:
                return screen("".join(shown))

    yield stream, look
    stream.close()
    os.close(ours)


def test_on_a_terminal_there_is_a_bar_for_each_run_and_one_line_for_the_sweep(terminal):
    stream, look = terminal
    sweep = SweepProgress({"narrow": 1.0, "wide-run": 1.0}, stream)
    sweep.show(Status("narrow", 5, 10, 3.25, 41_000.0, 5.0))
    sweep.show(Status("wide-run", 0, 10))
    lines = look()
    assert len(lines) == 3
    assert lines[0].startswith("sweep     25%|") and "0/2 runs done" in lines[0]
    assert lines[1].startswith("narrow    50%|")
    assert lines[1].endswith("| step 5/10, loss 3.2500, 41,000 tokens/s, 0:05 left")
    assert lines[2].startswith("wide-run   0%|") and lines[2].endswith("| step 0/10, compiling")
    sweep.end("narrow", "loss 3.0")
    sweep.end("wide-run", "loss 2.9")
    sweep.close()
    lines = look()
    assert lines[:2] == ["narrow: loss 3.0", "wide-run: loss 2.9"]
    assert len(lines) == 3 and lines[2].startswith("sweep    100%|") and "2/2 runs done" in lines[2]


def test_a_single_run_draws_its_own_bar_and_leaves_it(terminal, monkeypatch):
    stream, look = terminal
    monkeypatch.setattr(progress.sys, "stderr", stream)
    reporter = Progress(10, "run")
    reporter.update(10, 3.25, 41_000.0)
    reporter.close()
    (line,) = look()
    assert line.startswith("run 100%|") and "loss 3.2500" in line


def test_on_a_terminal_the_bar_of_a_run_that_is_refused_goes_away(terminal, monkeypatch):
    stream, look = terminal
    monkeypatch.setattr(progress.sys, "stderr", stream)
    reporter = Progress(10, "run", headline="runs/x: 10 steps")
    (line,) = look()
    assert line.endswith("| step 0/10, compiling")
    reporter.close()
    assert look() == []


def test_a_terminal_without_a_size_gets_lines(terminal):
    stream, look = terminal
    fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    SweepProgress({"a": 1.0}, stream).show(Status("a", 5, 10, 3.0, 1.0, 1.0))
    assert "a: step 5/10, loss 3.0000, 1 tokens/s, 0:01 left" in look()


def test_clock_is_read_as_one_reads_a_clock():
    assert [clock(s) for s in (None, 0, 59.6, 90, 3725)] == ["?", "0:00", "1:00", "1:30", "1:02:05"]
