"""Runs a program that a teacher wrote in a process closed off by `jail`, and tells in a few words how it ended."""

import ast
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from src.core.errors import MissingTool
from src.distill import sandbox_child

PASSED = "passed"
TAIL = 4096
"""bytes of a program's output that are kept"""
PATIENCE = 5
"""seconds on the clock for each of processor time, so that a busy machine fails no program"""


@dataclass(frozen=True)
class Limits:
    """seconds: of the processor. memory: bytes of address space, the interpreter's own included. closed: no network, files and processes, or nothing runs."""

    seconds: float
    memory: int
    closed: bool


def check(isolation: str, step: str) -> str | None:
    """What this kernel cannot close off, None if nothing. Raises MissingTool where that is needed (isolation "full")."""
    limits = json.dumps(asdict(Limits(5, 1 << 30, True)))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text("")
        done = subprocess.run([*_argv(limits), program], capture_output=True, text=True, env={}, timeout=60)
    if done.returncode == 0:
        return None
    lacking = done.stdout.strip() if done.returncode == sandbox_child.LACKING else f"to start Python in it ({done.stderr.strip()[-200:]})"
    if isolation == "full":
        raise MissingTool(
            f"programs cannot be closed off here: the kernel lacks {lacking}",
            where=f"recipe.steps.{step}",
            fix=["run on Linux 5.13 or later with Landlock", f"recipe.steps.{step}.isolation=limits, in a container or machine of its own"],
        )
    return lacking


def unfit(code: str, tests: str) -> str | None:
    """Why code and tests are not worth running; None where they are."""
    try:
        tree, checks = ast.parse(code), ast.parse(tests)
        hollow(code)  # it goes down into each expression, where the parser's limit is another
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not Python"
    if not any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in tree.body):
        return "no function"
    return None if any(isinstance(node, ast.Assert) for node in ast.walk(checks)) else "tests that assert nothing"


def hollow(code: str) -> str:
    """The code with a body of `return None` in each of its functions: tests that pass with it test nothing."""
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(tree))


async def run(program: str, limits: Limits) -> str:
    """PASSED if the program reached its end, else how it failed."""
    # The last line is said only where nothing before it ended the program, an exit with code 0 included.
    end = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(f'{program}\nprint("\\n{end}")\n', encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *_argv(json.dumps(asdict(limits))),
            file,
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None  # a pipe
        try:
            tail = await asyncio.wait_for(_tail(process.stdout), limits.seconds * PATIENCE + 5)
            code = await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            return "takes too long"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    return _outcome(code, tail.decode(errors="replace"), end)


def _argv(limits: str) -> list[str]:
    return [sys.executable, "-I", "-S", sandbox_child.__file__, limits]


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of a stream; all is read, so that a program that says much is not held up."""
    tail = b""
    while piece := await stream.read(1 << 16):
        tail = (tail + piece)[-TAIL:]
    return tail


def _outcome(code: int, tail: str, end: str) -> str:
    if code == 0:
        return PASSED if tail.rstrip().endswith(end) else "ends before its tests do"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "takes too long"
    last = tail.rstrip().rsplit("\n", 1)[-1].partition(":")[0]
    if last == "AssertionError":
        return "a test fails"
    return "takes too much memory" if last == "MemoryError" else "raises an error"
