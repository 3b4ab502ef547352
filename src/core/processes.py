"""Work in a process of its own, and libraries imported without their greetings."""

import atexit
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

from src.core.errors import MEMORY, NoMemory, UserError
from src.core.log import tell

T = TypeVar("T")
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
"""linux/prctl.h"""


def prepare_gptq_workers() -> None:
    """gptqmodel asks for more CPU workers than a small machine has and fails, unless told otherwise before its import."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(os.cpu_count() or 1, 8)))


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end. number: the signal's."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end this process as Ctrl-C does, by an exception that cleans up on its way; SIGHUP stays ignored under nohup.

    Behind it they end the process at once, since an interpreter that closes down has nothing left to clean up, and would show the exception.
    """

    def end(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(parent: int) -> None:
    """Have this process killed when the one that started it ends, however it does: by the kernel (PR_SET_PDEATHSIG, Linux; prctl(2)), or where a server
    has forked this one for it by looking.

    parent: its process id, to see whether it has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not lives(parent):
        os._exit(1)
    if os.getppid() != parent:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def lives(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for still has its id (state Z, proc(5))."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


_serving = False
"""whether the server that `begin` has its processes forked from has been started"""


def begin(work: Callable[..., object], *args: Any, waits: bool = True, forks: bool = True, name: str | None = None) -> BaseProcess:
    """A new process that does `work`, a module-level function, with this one's environment, and ends with this one, however this one ends.

    It is forked from a server that has imported torch and transformers and done nothing else, as are the processes that it begins itself. waits: for
    that import, which the first process begins; without it that one imports for itself what it needs, meanwhile. forks: without it the process begins as a
    new interpreter. name: by which `ps` and a traceback show it. Raises NoMemory where the server was killed.
    """
    global _serving
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.models.ready"])
    if not forks or not (waits or _serving):
        context = multiprocessing.get_context("spawn")
    if forks and not _serving:
        forkserver.ensure_running()
        _serving = True
    process: BaseProcess = context.Process(target=_begun, args=(os.getpid(), dict(os.environ), name, work, args), name=name)
    try:
        with _start_method_of_python():
            process.start()
    except (EOFError, ConnectionError):
        raise _killed() from None
    return process


@contextlib.contextmanager
def _start_method_of_python() -> Iterator[None]:
    """A new process takes over the default of the one that starts it, and does not know joblib's."""
    before = multiprocessing.get_start_method(allow_none=True)
    if before is None or before in multiprocessing.get_all_start_methods():
        yield
        return
    multiprocessing.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def fresh(function: Callable[..., T], *args: Any, waits: bool = True) -> T:
    """The result of a module-level function run in a new process, offline, which shares nothing with this one but the disk. waits: see `begin`."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = begin(_answer, sender, function, args, waits=waits)
    try:
        sender.close()
        done, value = receiver.recv()
    except (EOFError, ConnectionError):
        raise _killed() from None
    finally:
        process.kill()
        process.join()
    if not done:
        raise value
    found: T = value
    return found


def _killed() -> NoMemory:
    return NoMemory("a process of this stage was killed, most likely for lack of memory", fix=MEMORY)


def _begun(parent: int, environment: dict[str, str], name: str | None, work: Callable[..., object], args: tuple[Any, ...]) -> None:
    """What a process that `begin` made does. parent: the process that asked."""
    end_with_parent(parent)
    forked(environment)
    if name and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
    try:
        work(*args)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


_ignored: list[int] = []


def outlive_signals() -> None:
    """For the server: what is sent to all processes of a terminal or a job is for those that work, which would be killed with it before a checkpoint."""
    _ignored[:] = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in _ignored:
        signal.signal(number, signal.SIG_IGN)


def forked(environment: dict[str, str]) -> None:
    """Make a process that a server has forked as one that who asked for it had started. environment: of that one.

    Its own processes are forked from the same server, as the documentation of multiprocessing's `ensure_running` says they are; it looks for a child of
    this process, finds none, and would start another server.
    """
    global _serving
    os.environ.clear()
    os.environ.update(environment)
    for number in _ignored:
        signal.signal(number, signal.SIG_DFL)
    server: Any = forkserver._forkserver
    if server._forkserver_address is not None:
        server.ensure_running = lambda: None
        _serving = True


def serving() -> bool:
    """Whether processes that begin with torch imported are to be had."""
    return _serving


def _answer(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Send (True, the function's result), or (False, what it raised with its traceback in words)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C ends is the process that asked, and it ends this one
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:  # which has read it already
        constants: Any = importlib.import_module("huggingface_hub.constants")
        constants.HF_HUB_OFFLINE = True
    try:
        found = (True, function(*args))
    except Exception as error:
        found = (False, error)
        if not isinstance(error, UserError):
            error.add_note("".join(traceback.format_exception(error)))
            found = (False, error if _can_be_sent(error) else RuntimeError("".join(traceback.format_exception(error))))
    with contextlib.suppress(BrokenPipeError):  # who asked has ended, and ends us
        sender.send(found)


def _end_with(process: int) -> None:
    """Kill this process when another one has ended that is not its parent, however that ended: what it would go on with, the next run begins again."""
    while lives(process):
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _can_be_sent(error: Exception) -> bool:
    """Whether an exception survives the way to another process; some libraries' take other arguments to be made than they keep."""
    try:
        return type(ForkingPickler.loads(ForkingPickler.dumps(error))) is type(error)
    except Exception:
        return False


def import_quietly(*modules: str, without: Collection[str] = ()) -> None:
    """Import libraries that greet (gptqmodel, torchao, bitsandbytes, and what imports them) without their greetings. without: see `absent`."""
    prepare_gptq_workers()
    with silenced(), hub_cache_kept(), absent(without):
        for module in modules:
            importlib.import_module(module)


@contextlib.contextmanager
def absent(packages: Collection[str]) -> Iterator[None]:
    """Within the block, those of the packages that nothing has imported yet are as if not installed: a None in sys.modules, which `import` and
    importlib.util.find_spec both heed."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # typeshed has no None, the import system does
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def hub_cache_kept() -> Iterator[None]:
    """The hub's cache stays where it is: tokenicer, which gptqmodel imports, moves it to /tmp for this process and its children where nobody has set it."""
    from huggingface_hub import constants

    before = dict(os.environ)
    there = {"HF_HOME": constants.HF_HOME, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "TRANSFORMERS_CACHE": constants.HF_HUB_CACHE}
    there["HF_MODULES_CACHE"] = os.path.join(constants.HF_HOME, "modules")
    with contextlib.suppress(OSError):  # a home that cannot be written: tokenicer would fail to make its folders there
        for folder in there.values():
            os.makedirs(folder, exist_ok=True)
        os.environ.update({name: folder for name, folder in there.items() if name not in before})
    try:
        yield
    finally:
        for name in there:
            if name not in before:
                os.environ.pop(name, None)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing written to stdout or stderr, by Python or native code, shows; when the block raises, what was held back is printed first."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = [os.dup(1), os.dup(2)]
        os.dup2(held.fileno(), 1)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            _restore(saved)
            held.seek(0)
            tell(held.read().decode(errors="replace"))
            raise
        else:
            _restore(saved)


def _restore(saved: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, copy in enumerate(saved, 1):
        os.dup2(copy, number)
        os.close(copy)
