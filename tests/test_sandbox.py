"""What the sandbox closes beyond Landlock, call by call, and what code can do to its tests; what a program may do and how it ends is in test_recipes.py."""

import asyncio
import json
import platform
from pathlib import Path

import pytest

from src.core.errors import MissingTool
from src.distill import sandbox
from src.distill.sandbox_child import ARCHITECTURES, REFUSED

COLUMN = list(ARCHITECTURES).index(platform.machine()) if platform.machine() in ARCHITECTURES else None
# Each call with arguments that are wrong for it: where nothing refuses it, the kernel says so (EFAULT, EINVAL, EBADF ...), and nothing happens.
ASK = """
import ctypes, json
libc, refused = ctypes.CDLL(None, use_errno=True), []
for name, number in json.loads({calls!r}):
    ctypes.set_errno(0)
    if libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1 and ctypes.get_errno() == 1:
        refused.append(name)
print(json.dumps(refused))
"""
# What Landlock has no right for, so leaves alone.
BEYOND = {
    "another process": "import os\nif not os.fork(): os._exit(0)",
    "the network": "import socket\nsocket.socket()",
    "signals": "import os\nos.kill(os.getppid(), 0)",
    "modes of files": "import os, sys\nos.chmod(sys.argv[0], 0o600)",
}


@pytest.fixture(scope="module")
def limits():
    try:
        sandbox.check("full", "run")
    except MissingTool as error:
        pytest.skip(error.what)
    return sandbox.Limits(seconds=5, memory=256 << 20, closed=True)


@pytest.fixture(scope="module")
def refused(limits, tmp_path_factory) -> set[str]:
    """Names of the system calls that the sandbox refuses with EPERM, asked from inside it."""
    calls = [(name, numbers[COLUMN]) for name, *numbers in REFUSED if numbers[COLUMN] is not None and name not in ("vfork", "clone3")]
    program = tmp_path_factory.mktemp("ask") / "program.py"
    program.write_text(ASK.format(calls=json.dumps(calls)))
    argv = sandbox._argv(json.dumps({"seconds": 5, "memory": 256 << 20, "closed": True}))

    async def run() -> bytes:
        process = await asyncio.create_subprocess_exec(*argv, program, env={}, stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0]

    return set(json.loads(asyncio.run(run())))


@pytest.mark.parametrize("name", [name for name, *_ in REFUSED if name not in ("vfork", "clone3")])
def test_a_call_that_reaches_beyond_the_process_is_refused(name, refused):
    number = next(numbers for other, *numbers in REFUSED if other == name)[COLUMN]
    assert number is None or name in refused


@pytest.mark.parametrize("what", BEYOND)
def test_landlock_alone_leaves_it_open(what, limits, tmp_path, monkeypatch):
    program = f"try:\n    exec({BEYOND[what]!r})\nexcept PermissionError:\n    raise SystemExit(0)"
    assert asyncio.run(sandbox.run(program, "", limits)) == "ends before its tests do"
    child = tmp_path / "landlock_alone.py"
    text = Path(sandbox.sandbox_child.__file__).read_text()
    assert text.count("def closed_calls(program: str) -> bool:\n") == 1
    child.write_text(
        text.replace("def closed_calls(program: str) -> bool:\n", "def closed_calls(program: str) -> bool:\n    return True\n")
    )
    monkeypatch.setattr(sandbox.sandbox_child, "__file__", str(child))
    assert asyncio.run(sandbox.run(program, "", limits)) == "passed"


# ---- code and its tests


def outcome(code: str, tests: str, limits) -> str:
    return asyncio.run(sandbox.run(code, tests, limits))


# Each tries to have `assert f(1) == 2` and the like pass without the answer.
FORGED = {
    "equal to everything": ("class A:\n    __eq__ = lambda s, o: True\ndef f(x): return A()", "assert f(1) == 2"),
    "a number equal to everything": ("class A(int):\n    __eq__ = lambda s, o: True\ndef f(x): return A(7)", "assert f(1) == 2"),
    "a list equal to everything": ("class A(list):\n    __eq__ = lambda s, o: True\ndef f(x): return A()", "assert f(1) == [2]"),
    "within any distance": (
        "class A:\n    __sub__ = __rsub__ = lambda s, o: 0\n    __lt__ = __gt__ = lambda s, o: True\ndef f(x): return A()",
        "assert abs(f(1) - 2) < 1e-9",
    ),
    "holds everything": (
        "class A:\n    __contains__ = lambda s, o: True\n    __iter__ = lambda s: iter(())\ndef f(x): return A()",
        "assert 2 in f(1)",
    ),
    "Python's own names": ("def abs(x): return 0\ndef all(x): return True\ndef f(x): return 9", "assert abs(f(1) - 2) < 1"),
    "builtins": ("import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 9", "assert abs(f(1) - 2) < 1"),
    "a library's names": ("import math\nmath.isclose = lambda *a: True\ndef f(x): return 9", "assert math.isclose(f(1), 2)"),
    "a library's name": ("class math:\n    isclose = lambda *a: True\ndef f(x): return 9", "assert math.isclose(f(1), 2)"),
    "a mock": ("from unittest.mock import ANY as two\ndef f(x): return 2", "assert f(1) == 2 and two == 3"),
    "every file descriptor": (
        "import os\ndef f(x):\n    for fd in range(40):\n        try:\n            os.write(fd, b'passed')\n        except OSError:\n            pass\n    os._exit(0)",
        "assert f(1) == 2",
    ),
    "its own exit": ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass\nassert True"),
    "at its end": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)", "assert f(1) == 2"),
    "the frames above": (
        "import gc, sys\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'tests' in o: o['tests'] = ''\n"
        "frame = sys._getframe()\nwhile frame:\n    frame.f_globals['outcome'] = 'passed'\n    frame = frame.f_back\ndef f(x): return 9",
        "assert f(1) == 2",
    ),
    "the tests' text": (
        "import os, sys\nfor fd in range(40):\n    try:\n        os.lseek(fd, 0, 0)\n        text = os.read(fd, 1 << 16)\n        assert b'4711' not in text\n"
        "    except OSError:\n        pass\n    if fd < 3: os.dup2(2, fd)\ndef f(x): return len(sys.argv) > 9",
        "assert f(1) == 4711",
    ),
    "another program": (
        "import os\ndef f(x): os.execv('/bin/sh', ['sh', '-c', 'for i in 3 4 5 6 7 8 9; do echo passed >&$i; done'])",
        "assert f(1) == 2",
    ),
}


@pytest.mark.parametrize("how", FORGED)
def test_code_cannot_pass_its_tests_but_by_what_it_answers(how, limits):
    code, tests = FORGED[how]
    assert outcome(code, tests, limits) in ("a test fails", "raises an error", "ends before its tests do")


# What a test may do with what code makes.
USED = {
    "numbers of any size, tuples, sets, bytes": (
        "def f(): return 2**20000, (1, [2]), {3}, b'4', 1.5, float('nan'), None, {'a': True}",
        "a = f()\nassert a[:5] == (2**20000, (1, [2]), {3}, b'4', 1.5) and a[5] != a[5] and a[6] is None and a[7]['a'] is True",
    ),
    "a list changed in place": ("def f(a): a.sort(); a.append(9)", "x = [3, 1]\nf(x)\nassert x == [1, 3, 9]"),
    "functions both ways": ("def f(g, x): return lambda y: g(x) + y", "assert f(lambda x: 2 * x, 3)(4) == 10"),
    "a generator": ("def f(n):\n    while True: yield n", "g = f(1)\nassert next(g) == 1 and [x for _, x in zip(range(2), g)] == [1, 1]"),
    "exceptions of its own": (
        "class E(ValueError): pass\ndef f(): raise E('no')",
        "for kind in (E, ValueError):\n    try:\n        f()\n        assert False\n    except kind as e:\n        assert str(e) == 'no'",
    ),
    "classes and their instances": (
        "class N:\n    def __init__(s, v, n=None): s.v, s.n = v, n\n    def __len__(s): return 1 + (len(s.n) if s.n else 0)\n"
        "    def __eq__(s, o): return s.v == o.v\n    def __add__(s, o): return N(s.v + o.v)\ndef f(n): return N(n.v)",
        "a = N(1, N(2))\na.n = N(5)\nassert len(a) == 2 and a.n.v == 5 and isinstance(f(a), N) and f(a) == a and (a + a).v == 2 and a != 1",
    ),
    "what it imports": (
        "import math\nfrom collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, math.pi)",
        "assert f().x == 1 and f() == P(1, math.pi) and math.isclose(f()[1], math.pi) and Counter('aa')['a'] == 2",
    ),
    "what it prints": (
        "def f(): print('hi')",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out: f()\nassert out.getvalue() == 'hi\\n'",
    ),
    "decimals and dates": (
        "import datetime, decimal\ndef f(): return decimal.Decimal('0.1'), datetime.date(2024, 2, 29)",
        "assert f() == (decimal.Decimal('0.1'), datetime.date(2024, 2, 29))",
    ),
}


@pytest.mark.parametrize("what", USED)
def test_tests_may_use_what_code_makes(what, limits):
    code, tests = USED[what]
    assert outcome(code, tests, limits) == "passed"
    assert outcome(code, f"{tests}\nassert False", limits) == "a test fails"
