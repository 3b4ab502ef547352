"""Errors that a user can mend. Each has its own exit code and prints what, where and what to do, without a traceback.

    UserError          2
      ConfigError      2   a setting is unknown, malformed or contradicts another
      MissingInput     3   a run, artifact, model folder or file is not there
      WrongKind        4   an input of a kind that this stage does not take
      Moved            5   finished with other settings, or from other parents
      BadData          6   an input's content is damaged, malformed or hostile
      MissingTool      7   a program, device or package is not installed
      ProofFailed      8   a stage's own check did not hold; nothing was published
      Tampered         9   bytes differ from what a manifest says
      NoRoom          10   the disk is full, or a folder cannot be written or read
      Busy            11   another process is at the same artifact
      Unfinished      12   all is prepared and kept; a vendor's tool is not here
      ToolFailed      13   a vendor's tool did not give what it should
      NoAnswer        14   a server was not reached, refused, or broke its protocol
        Refused       14   ... by an HTTP status other than 200 (serving/protocol.py)
      NoMemory        15   what was asked for does not fit in memory
      BudgetSpent     16   what a teacher may cost is spent; all answers are kept
      GateFailed      17   a report does not keep to a gate's limit; it is kept
      Withheld        18   what was to be shared is private, or holds what is

`Stopped` (distill/dispatch.py) is a UserError that no one sees. Anything else that escapes a stage is a bug: it keeps its traceback and Python's exit
code 1.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

AGAIN = "copy or download it again, or mend it where you changed it"
"""the way out of a damaged file"""
MEMORY = "free memory or add swap, then run the same command again"
NO_SPACE = ["free space, then run the same command again", "move the outputs folder to a larger disk and name it with outputs=FOLDER"]
"""ways out of a full disk; what a run has made there is what its next stage begins with"""


class UserError(Exception):
    """Something the user can mend.

    what: one sentence, the fault itself.
    where: the file, key, record or command it concerns.
    fix: ways out, most likely first.
    """

    exit_code = 2
    title = "error"

    def __init__(self, what: str, *, where: str = "", fix: str | Sequence[str] = ()):
        self.what = what
        self.where = where
        self.fix = [fix] if isinstance(fix, str) else list(fix)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        lines += [f"  {'fix:  ' if i == 0 else 'or:   '} {way}" for i, way in enumerate(self.fix)]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(cls: type[UserError], what: str, where: str, fix: list[str]) -> UserError:
    return cls(what, where=where, fix=fix)


class ConfigError(UserError):
    """A setting is unknown, malformed or contradicts another. `what` may hold several lines, one per fault."""

    exit_code = 2
    title = "configuration error"


class MissingInput(UserError):
    """A run, artifact, model folder or file that a stage needs is not there."""

    exit_code = 3
    title = "missing input"


class WrongKind(UserError):
    """An artifact or model of a kind this stage does not take."""

    exit_code = 4
    title = "wrong kind of input"


class Moved(UserError):
    """A finished artifact was made with other settings or from other parents than the ones asked for now."""

    exit_code = 5
    title = "would overwrite"


class BadData(UserError):
    """The content of an input file is damaged, malformed or hostile."""

    exit_code = 6
    title = "bad input data"


class MissingTool(UserError):
    """A program, device or package that the stage needs is not installed."""

    exit_code = 7
    title = "missing tool"


class ProofFailed(UserError):
    """A stage checked its own result and the check did not hold; nothing was published."""

    exit_code = 8
    title = "self-check failed"


class Tampered(UserError):
    """Bytes on disk differ from what a manifest says."""

    exit_code = 9
    title = "verification failed"


class NoRoom(UserError):
    """The disk is full, or a folder cannot be written or read."""

    exit_code = 10
    title = "cannot write"


class Busy(UserError):
    """Another process is working on the same artifact."""

    exit_code = 11
    title = "already running"


class Unfinished(UserError):
    """Everything that could be made is made and kept; what remains needs a vendor's tool that is not here."""

    exit_code = 12
    title = "prepared, not finished"


class ToolFailed(UserError):
    """A vendor's tool ran and did not give what it should."""

    exit_code = 13
    title = "the vendor's tool failed"


class NoAnswer(UserError):
    """A server could not be reached, refused, or did not answer in its protocol."""

    exit_code = 14
    title = "no answer from the endpoint"


class NoMemory(UserError):
    """What was asked for does not fit in the memory of the GPU or the machine."""

    exit_code = 15
    title = "does not fit in memory"


class BudgetSpent(UserError):
    """What a teacher may cost is spent, or the next request could pass it; all answers so far are kept."""

    exit_code = 16
    title = "budget spent"


class GateFailed(UserError):
    """A figure of a finished report is beyond the limit that a gate sets; the report is kept. `what` has a line for each such figure."""

    exit_code = 17
    title = "gate failed"


class Withheld(UserError):
    """What was to be shared is marked private, or was made from what is, or holds a key or a path of this machine; nothing was sent."""

    exit_code = 18
    title = "not shared"


@contextlib.contextmanager
def using(what: str, where: object, fix: str | Sequence[str] = AGAIN) -> Iterator[None]:
    """For a library at work on a user's files, which fails at damaged ones in ways of its own: raises BadData with its words, or MissingTool where
    it lacks another library. Lack of memory or disk stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ImportError as error:
        raise MissingTool(
            f"{what} needs a library that is not here: {error}", where=str(where), fix=f"pip install {error.name}" if error.name else ()
        ) from error
    except Exception as error:
        if getattr(error, "errno", None) or "out of memory" in str(error).lower():
            raise
        raise BadData(f"{what} cannot be used: {type(error).__name__}: {str(error)[:500]}", where=str(where), fix=fix) from error
