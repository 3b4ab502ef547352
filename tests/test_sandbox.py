"""What the sandbox closes beyond Landlock, call by call; what a program may do and how it ends is in test_recipes.py."""

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
    assert asyncio.run(sandbox.run(program, limits)) == "ends before its tests do"
    child = tmp_path / "landlock_alone.py"
    text = Path(sandbox.sandbox_child.__file__).read_text()
    assert text.count("def closed_calls(program: str) -> bool:\n") == 1
    child.write_text(
        text.replace("def closed_calls(program: str) -> bool:\n", "def closed_calls(program: str) -> bool:\n    return True\n")
    )
    monkeypatch.setattr(sandbox.sandbox_child, "__file__", str(child))
    assert asyncio.run(sandbox.run(program, limits)) == "passed"
