"""Calls are checked before anything runs, and what a model writes runs in a sandbox or not at all."""

import io
import json
import time
import types

import pytest

from llm_jax.chat import Chat
from llm_jax.config import UserError
from llm_jax.inference import sandbox, tools
from llm_jax.inference.sandbox import SandboxError
from llm_jax.inference.tools import CallError, calculator, calendar, result_of, toolbox

pytest.importorskip("pydantic_monty", reason="the extra `tools` isn't installed")

FILLS = "for i in range(9):\n    open('{folder}/%d' % i, 'wb').write(bytes(8 << 20))"
HOSTILE = {
    "reads a file": "open('/etc/passwd').read()",
    "lists the disk": "import os\nos.listdir('/')",
    "writes a file": "open('{place}', 'w').write('x')",
    "removes a file": "import os\nos.remove('{there}')",
    "by pathlib": "from pathlib import Path\nPath('{there}').read_text()",
    "runs a program": "import os\nos.system('touch {place}')",
    "a process": "import subprocess\nsubprocess.run(['touch', '{place}'])",
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "a page": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
    "C's library": "import ctypes\nctypes.CDLL(None).system(b'touch {place}')",
    "another import": "__import__('os').system('touch {place}')",
    "by classes": "[c for c in ().__class__.__base__.__subclasses__() if 'Popen' in str(c)][0]('{place}')",
    "by globals": "(lambda: 0).__globals__['__builtins__']['open']('{place}', 'w')",
    "by a frame": "import sys\nsys._getframe(1).f_globals",
    "an endless loop": "while True:\n    pass",
    "an endless wait": "import time\ntime.sleep(1000)\nwhile True:\n    pass",
    "a huge text": "'a' * 10**11",
    "a growing list": "x = []\nwhile True:\n    x.append('a' * 100000)",
    "a huge number": "10 ** 10**9",
    "endless recursion": "def f():\n    f()\nf()",
    "endless output": "while True:\n    print('spam' * 1000)",
    "nested brackets": "(" * 3000 + ")" * 3000,
    "not Python": "rm -rf / --no-preserve-root",
    "it ends the process": "import os\nos._exit(1)",
    "it kills": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nraise SystemExit(1)",
    "forks": "import os\nwhile True:\n    os.fork()",
    "memory of many": "import os\nfor i in range(9):\n    os.fork() or bytes(90 << 20) and os._exit(0)",
    "fills the root": FILLS.replace("{folder}", ""),
    "fills /tmp": FILLS.replace("{folder}", "/tmp"),
    "fills the devices": FILLS.replace("{folder}", "/dev"),
    "fills shared memory": FILLS.replace("{folder}", "/dev/shm"),
    "files in memory": "import os\nfor i in range(40):\n    os.write(os.memfd_create(''), bytes(15 << 20))",
    "segments": "import ctypes\n1 / (ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) + 1)",
    "mounts": "import ctypes\nc = ctypes.CDLL(None)\nc.unshare(1 << 28 | 1 << 17)\n"
    "1 / (c.mount(b'x', b'/tmp', b'tmpfs', 0, b'') + 1)",
}


@pytest.fixture
def traps(tmp_path):
    """What a hostile program may try: a place to write to, a file that is there, a port that listens."""
    import socket

    (tmp_path / "there").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"place": tmp_path / "made", "there": tmp_path / "there", "port": server.getsockname()[1]}
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody came
    assert (tmp_path / "there").read_text() == "secret" and not (tmp_path / "made").exists()


def attempted(run, program, traps):
    """The program's complaint, which comes in time."""
    for name, value in traps.items():
        program = program.replace(f"{{{name}}}", str(value))
    start = time.monotonic()
    with pytest.raises(SandboxError) as error:
        run(program)
    assert time.monotonic() - start < 3 * sandbox.SECONDS + 4
    assert len(str(error.value)) <= 400 and "secret" not in str(error.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_nothing_but_an_error(name, traps, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    attempted(sandbox.monty, HOSTILE[name], traps)
    assert sandbox.monty("print(6 * 7)") == "42"  # the next one runs


def test_a_program_sees_no_environment_and_no_variables_of_another(monkeypatch):
    monkeypatch.setenv("LLM_JAX_TOKEN", "secret")
    sandbox.monty("left = 1")
    with pytest.raises(SandboxError, match="left"):
        sandbox.monty("left")
    try:
        found = sandbox.monty("import os\nos.environ.get('LLM_JAX_TOKEN')")
    except SandboxError as error:
        found = str(error)
    assert "secret" not in found


def test_programs_say_what_they_print_and_their_last_value():
    assert sandbox.monty("print('a')\nsum(range(5))") == "a\n10"
    assert sandbox.monty("x = 1") == "(no output)"
    assert sandbox.monty("from datetime import date\n(date(2025, 3, 1) - date(2025, 2, 1)).days") == "28"
    with pytest.raises(SandboxError, match="ZeroDivisionError"):
        sandbox.monty("1 / 0")


@pytest.fixture(scope="module")
def bubblewrap():
    """The machine's own Python in namespaces, where they may be made."""
    try:
        assert sandbox.bubblewrap("print(6 * 7)") == "42"
    except (OSError, SandboxError, AssertionError) as error:
        pytest.skip(f"no bubblewrap here: {error}")
    return sandbox.bubblewrap


BENIGN_THERE = (
    "lists the disk",
    "by a frame",
    "a huge number",
    "by globals",
    "nested brackets",
)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in BENIGN_THERE])
def test_full_python_reaches_nothing_outside_its_walls(name, bubblewrap, traps, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    program = HOSTILE[name].replace("import os\nos.system", "import os\n1 / os.system")  # 0: it did run
    program = program.replace("__import__('os').system", "1 / __import__('os').system")
    if name in (
        "C's library",
        "by classes",
        "writes a file",
        "a process",
        "runs a program",
        "another import",
    ):
        with pytest.raises(SandboxError):  # there is no such folder; where it runs, it says nothing
            bubblewrap(program.replace("{place}", str(traps["place"])) + "\nraise SystemExit(1)")
    elif name == "reads a file":
        with pytest.raises(SandboxError):
            bubblewrap(program)
    else:
        attempted(bubblewrap, program, traps)


def test_full_python_has_its_library_and_no_environment(bubblewrap, monkeypatch):
    monkeypatch.setenv("LLM_JAX_TOKEN", "secret")
    assert bubblewrap("import fractions\nprint(fractions.Fraction(6, 4))") == "3/2"
    assert "secret" not in bubblewrap("import os\nprint(dict(os.environ))")
    assert "root:" not in bubblewrap("import os\nprint(os.listdir('/'))")


# ---- calls ----


@pytest.mark.parametrize(
    "call, error",
    [
        ("2 + 2", "a call is JSON"),
        ("[]", "a call has a name and arguments"),
        ('{"name": "calculator", "args": {}}', "a call has a name and arguments"),
        ('{"name": "shell", "arguments": {}}', "no tool 'shell'; there are: calculator"),
        ('{"name": ["calculator"]}', "no tool"),
        ('{"name": "calculator"}', "arguments.expression is missing"),
        ('{"name": "calculator", "arguments": []}', "arguments is no object"),
        ('{"name": "calculator", "arguments": {"expression": 2}}', "arguments.expression is no string"),
        ('{"name": "calculator", "arguments": {"expression": "1", "x": 1}}', "arguments has no 'x'"),
        (json.dumps({"name": "calculator", "arguments": {"expression": "1+" * 200}}), "longer than 200"),
        ('{"name": "calendar", "arguments": {"date": "2025-01-01", "days": true}}', "days is no integer"),
        ('{"name": "calendar", "arguments": {"date": "2025-01-01", "days": NaN}}', "a call is JSON"),
        ('{"name": "calendar", "arguments": {"date": "2025-01-01", "days": 9e9}}', "days is no integer"),
        ('{"name": "calendar", "arguments": {"date": "2025-01-01", "days": 9000000}}', "days lies outside"),
        ('{"name": "calendar", "arguments": {"date": "2025-01-01", "weekday": "Noday"}}', "is one of Monday"),
        ("x" * 9000, "at most 8000 characters"),
        ("[" * 5000, "a call is JSON"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(call, error):
    result = result_of(call, toolbox())
    assert result.startswith("error: ") and error in result


@pytest.mark.parametrize("name", ["python", "full_python"])
@pytest.mark.parametrize("code", [r"\ud800", r"\u0000", r"print('\udc00')"])
def test_code_that_is_no_text_is_a_wrong_call(name, code):
    call = f'{{"name": "{name}", "arguments": {{"code": "{code}"}}}}'
    result = result_of(call, {name: tools.TOOLS[name]})
    assert result == "error: arguments.code has characters that no text has"


@pytest.mark.parametrize("run", [lambda: 1 / 0, lambda: [][0], lambda code: "1"])
def test_a_fault_of_a_tool_is_its_result(run):
    mine = tools.Tool("mine", "", {"type": "object", "properties": {}}, run)
    assert result_of('{"name": "mine"}', {"mine": mine}).startswith("error: the tool failed (")


def test_whatever_a_tool_answers_can_be_written():
    mine = tools.Tool("mine", "", {"type": "object", "properties": {}}, lambda: "half \ud83d")
    assert result_of('{"name": "mine"}', {"mine": mine}) == "half ?"


def test_a_right_call_has_a_result_of_bounded_length():
    def ask(name, **arguments):
        return result_of(json.dumps({"name": name, "arguments": arguments}), toolbox())

    assert ask("calculator", expression="2 * (3 + 4)") == "14"
    assert ask("python", code="print(sum(range(10)))") == "45"
    assert ask("python", code="1 / 0").startswith("error: ")
    assert len(ask("python", code="print('a' * 5000)")) < 2100


@pytest.mark.parametrize(
    "expression, value",
    [
        ("2 + 3 * 4", "14"),
        ("-(2 ** 10) // 3", "-342"),
        ("7 / 2", "3.5"),
        ("10 ** 50", str(10**50)),
        ("7 % -3", "-2"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333333"),
        ("10 ** -70", "1e-70"),
        ("0 ** 70", "0"),
    ],
)
def test_the_calculator_is_right(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9 ** 9 ** 9", "1 / 0", "10 ** 61", "__import__('os')", "f(1)", "a", "'a' * 9", "(-8) ** 0.5", "",
     "1 if 1 else 2", "1e999", "True + 1", "(" * 250 + "1" + ")" * 250, "1 << 99999999", "0.0 ** -1",
     "-" * 900, "[1][0]"],
)  # fmt: skip
def test_the_calculator_computes_numbers_only(expression):
    with pytest.raises(CallError):
        calculator(expression)


@pytest.mark.parametrize("expression, hint", [("2^3", r"written \*\*"), ("1,000 + 1", "no commas")])
def test_the_calculator_says_how_a_number_and_a_power_are_written(expression, hint):
    with pytest.raises(CallError, match=hint):
        calculator(expression)


def test_the_calendar_knows_days():
    assert calendar("2025-03-05") == "2025-03-05, Wednesday"
    assert calendar("2025-03-05", weekday="Wednesday") == "2025-03-12, Wednesday"
    assert calendar("2025-03-05", weekday="Thursday") == "2025-03-06, Thursday"
    assert calendar("2024-02-28", days=2) == "2024-03-01, Friday"
    assert calendar("2025-03-05", until="2025-12-25") == "295 days"
    for wrong in (
        {"date": "5.3.2025"},
        {"date": "20250305"},
        {"date": "2025-W10-3"},
        {"date": "2025-02-30"},
        {"date": "9999-12-31", "days": 1},
        {"date": "2025-03-05", "days": 1, "until": ""},
    ):
        with pytest.raises(CallError):
            calendar(**wrong)


def test_a_schema_that_would_not_be_checked_is_refused():
    with pytest.raises(ValueError, match="pattern"):
        tools.check("a", {"type": "string", "pattern": "b"}, "x")
    nested = {"type": "array", "maxItems": 2, "items": {"type": "number", "minimum": 0}}
    tools.check([1, 2.5], nested, "x")
    for wrong, message in (
        ([1, 2, 3], "longer than 2"),
        ([-1], "x.0 lies outside"),
        ([True], "x.0 is no number"),
    ):
        with pytest.raises(CallError, match=message):
            tools.check(wrong, nested, "x")


def _no_namespaces():
    raise SandboxError("no namespaces")


def test_tools_that_are_not_there_are_named(monkeypatch):
    with pytest.raises(UserError, match="no tool 'calculater'; did you mean 'calculator'"):
        toolbox(["calculater"])
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "bwrap")
    monkeypatch.setattr(sandbox, "bubblewrap", lambda code: _no_namespaces())
    with pytest.raises(UserError, match="bubblewrap, which doesn't run here: no namespaces"):
        toolbox(["full_python"])
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        toolbox(["full_python"])


# ---- the loop ----


class Scripted:
    """A speaker that says what it is told to, whatever it hears."""

    name = "scripted"

    def __init__(self, *texts):
        self.texts, self.heard = list(texts), []

    def reply(self, messages, sampling, max_tokens, stops):
        self.heard.append(list(messages))
        text, stop, _ = self.texts.pop(0).partition(stops[-1])
        reply = Said(text)
        reply.answer = types.SimpleNamespace(text=text, stopped_at=stop)
        return reply


class Said(str):
    def close(self):
        pass


CALL = '<T_C>{"name": "calculator", "arguments": {"expression": "6*7"}}</T_C>'


def test_a_call_is_answered_by_a_tool_s_turn_and_the_model_goes_on():
    speaker = Scripted(f"Let me see. {CALL} and then?", "It is 42. ")
    asked = [{"role": "user", "content": "What is 6 * 7?"}]
    said = tools.answered(speaker, asked, toolbox())
    assert said == [
        {"role": "assistant", "content": f"Let me see. {CALL}"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    assert speaker.heard == [asked, asked + said[:2]]


def test_a_call_that_is_not_finished_runs_nothing():
    text = CALL.removesuffix("</T_C>")
    assert tools.answered(Scripted(text), [], toolbox()) == [{"role": "assistant", "content": text}]


def test_a_model_that_calls_forever_is_ended():
    runs = []
    box = {"calculator": tools.TOOLS["calculator"]._replace(run=lambda **_: runs.append(1) or "42")}
    said = tools.answered(Scripted(*[CALL] * 9), [], box)
    assert [turn["role"] for turn in said] == ["assistant", "tool"] * tools.MOST_CALLS + ["assistant"]
    assert said[-1]["content"] == CALL and len(runs) == tools.MOST_CALLS
    chat = Chat([Scripted(*[CALL] * 9)], out=io.StringIO(), tools=box)
    chat.say("What is 6 * 7?")
    assert chat.messages(0)[2:] == said and len(runs) == 2 * tools.MOST_CALLS
    assert chat.out.getvalue().endswith("[scripted has had its 4 calls: this one is not run]\n")


def test_a_chat_shows_calls_and_their_results_and_each_model_hears_its_own():
    first = Scripted(f"Hm. {CALL}", "It is 42.")
    second = Scripted("No idea.")
    chat = Chat([first, second], out=io.StringIO(), system="Be.", tools=toolbox(["calculator"]))
    chat.say("What is 6 * 7?")
    shown = chat.out.getvalue()
    assert "[scripted is told: 42]" in shown and "It is 42." in shown
    assert [turn["role"] for turn in chat.messages(0)] == ["system", "user", "assistant", "tool", "assistant"]
    assert [turn["role"] for turn in chat.messages(1)] == ["system", "user", "assistant"]
    assert chat.messages(0)[0]["content"].startswith("Be.\n\nYou can call a tool")
    assert first.heard[1] == chat.messages(0)[:-1] and len(second.heard) == 1


def test_a_real_model_is_stopped_at_its_call_and_asked_again_with_the_result():
    """One that says a whole call as one token, and once it has read its call, which is then forbidden, Z."""
    from serving import CALLER_ID, LAST_ID, caller

    from llm_jax.inference.conversation import Speaker
    from llm_jax.inference.sampling import Sampling

    sampling = Sampling(logit_bias={CALLER_ID: 900, LAST_ID: 500}, repetition_penalty=1e30)
    asked = [{"role": "user", "content": "hi"}]
    assert tools.answered(Speaker(caller()), asked, toolbox(["calculator"]), sampling, max_tokens=1) == [
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "Z"},
    ]
