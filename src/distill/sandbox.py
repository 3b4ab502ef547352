"""Runs code that a teacher wrote against its tests, in two processes that `sandbox_child` closes off, and tells in a few words how it ended."""

import ast
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from src.core.errors import MissingTool
from src.distill import sandbox_child, sandbox_program

PASSED = "passed"
TOO_LONG = "takes too long"
OUTCOMES = (PASSED, "a test fails", "raises an error", "takes too much memory", "ends before its tests do")
"""what sandbox_program says"""
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
            fix=f"recipe.steps.{step}.isolation=limits, in a container or machine of its own",
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


async def run(code: str, tests: str, limits: Limits) -> str:
    """PASSED if the tests reached their end, else how they failed.

    Code and tests run in two closed processes (sandbox_program): the code's cannot reach what the tests', and through them this one, decide by.
    """
    given = json.dumps({"imports": imports(code), "tests": tests})
    with contextlib.ExitStack() as fds, tempfile.TemporaryFile() as code_file, tempfile.TemporaryFile() as tests_file:
        for file, text in ((code_file, code), (tests_file, given)):
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
        calls, answers, verdict = (_Pipe(fds) for _ in range(3))
        argv = [*_argv(json.dumps(asdict(limits))), sandbox_program.__file__]
        processes = []
        try:
            for role, stdin, ends in (
                ("code", code_file, (calls.reads, answers.writes)),
                ("tests", tests_file, (answers.reads, calls.writes, verdict.writes)),
            ):
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    role,
                    *map(str, ends),
                    cwd="/",
                    env={},
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=ends,
                )
                processes.append(process)
            for pipe in (calls, answers):
                pipe.close()
            asked, judge = processes
            await asyncio.wait_for(judge.wait(), limits.seconds * PATIENCE + 5)
            with contextlib.suppress(TimeoutError):  # it ends with the tests, unless it is busy
                await asyncio.wait_for(asked.wait(), 0.2)
            return _outcome(verdict.read(), [process.returncode for process in processes])
        except TimeoutError:
            return TOO_LONG
        finally:
            for process in processes:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()


class _Pipe:
    """reads, writes: its file descriptors, closed with `fds` at the latest."""

    def __init__(self, fds: contextlib.ExitStack):
        self.reads, self.writes = os.pipe()
        self._open = [self.reads, self.writes]
        fds.callback(self.close)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def read(self) -> str:
        """What is in it now."""
        os.set_blocking(self.reads, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(self.reads, 100).decode(errors="replace")
        return ""


def imports(code: str) -> list[str]:
    """The code's import statements as tests may use them: without those of objects that pass for anything."""
    found = []
    for node in sandbox_program.imports(code):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if not {name.partition(".")[0] for name in modules} & {"unittest", "__main__", ""}:
            found.append(ast.unparse(node))
    return found


def _argv(limits: str) -> list[str]:
    return [sys.executable, "-I", "-S", sandbox_child.__file__, limits]


def _outcome(verdict: str, codes: list[int | None]) -> str:
    """The tests' own word, but where a process was ended for its time."""
    if verdict != PASSED and {-signal.SIGXCPU, -signal.SIGKILL} & set(codes):
        return TOO_LONG
    return verdict if verdict in OUTCOMES else "ends before its tests do"
