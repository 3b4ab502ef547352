"""Talk to a model in the terminal: any folder, adapter, quantized model, bundle or server, alone or beside another.

    python -m src.chat PATH [key=value ...]

On a terminal answers come as they are made, Ctrl-C ends one, and /help lists the commands. Whatever is piped in is one prompt, and its answer goes to
stdout. docs/chat.md has more.
"""

# The verb lives beside the templates because `python -m src.chat` finds it here; it stands above all floors, as every verb does, and nothing imports it.

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from src.core import compose, room, stage
from src.core.artifact import Artifact
from src.core.errors import BadData, ConfigError, MissingInput, UserError
from src.core.log import in_colour, on_terminal, out, say, shown, tell
from src.core.processes import Interrupted
from src.models.speaking import Ended
from src.records.formats import tools_of
from src.records.json_stream import Malformed
from src.serving import opening
from src.serving.conversation import Conversation
from src.settings.answers import Decoding
from src.settings.verbs import ChatVerb

NARROW = 80
"""columns below which two answers stand one after the other"""
FENCE = '"""'
"""a line of it begins and ends a prompt of several lines"""
HELP = f"""\
/clear            begin a new conversation
/history          what was said
/system [TEXT]    system text of this conversation from here on; without TEXT there is none
/seed N           seed of the draws
/set [KEY VALUE]  how answers are made: temperature, top_p, max_tokens, seed, stop; alone it shows them
/save FILE        the conversation as JSON Lines, which data.path= takes
/help             these lines
/quit             or Ctrl-D
{FENCE}               begins and ends a prompt of several lines
Ctrl-C            ends an answer; what was said of it stays"""


class Leave(Exception):
    """The user has had enough."""


def chat(overrides: list[str]) -> int:
    cfg = compose.compose("chat", compose.with_path(overrides, "source"), ChatVerb)
    run = stage.Run(Path(cfg.outputs) / cfg.run, dry=cfg.dry_run)
    found = find(cfg, run)
    tools = read_tools(Path(cfg.tools)) if cfg.tools else None
    for line in plan(cfg, found):
        say(f"chat: {line}")
    if cfg.dry_run:
        return 0
    with contextlib.ExitStack() as stack:
        opened = [opening.open_speaker(one, None if number else cfg.base, cfg.environment) for number, one in enumerate(found)]
        opened += [opening.of_endpoint(cfg.endpoint)] if cfg.endpoint.url else []
        for speaker in opened:
            stack.callback(speaker.close)
        talks = [Conversation(one, system=cfg.system, tools=tools, forgets=cfg.overflow == "forget") for one in opened]
        if not sys.stdin.isatty():
            return answer_piped(talks, cfg.decoding)
        Terminal(talks, cfg.decoding, Path(cfg.history) if cfg.history else None).run()
    return 0


def find(cfg: ChatVerb, run: stage.Run) -> list[Artifact]:
    """Who talks, but for a server."""
    own = [] if cfg.endpoint.url and not cfg.source else [opening.find(run, cfg.source)]
    return own + ([opening.find(run, cfg.compare)] if cfg.compare else [])


def plan(cfg: ChatVerb, found: list[Artifact]) -> list[str]:
    lines = [opening.check(one) for one in found] + ([cfg.endpoint.url] if cfg.endpoint.url else [])
    return [*lines, room.check(opening.needs(found), room.here(Path(cfg.outputs)), ignore=cfg.room == "ignore")] if found else lines


def read_tools(path: Path) -> list[dict]:
    """Raises MissingInput, BadData."""
    if not path.is_file():
        raise MissingInput("no such file", where=str(path), fix="tools=FILE names one that is there")
    try:
        return list(tools_of({"tools": path.read_text("utf-8")}) or [])
    except (Malformed, UnicodeDecodeError) as fault:
        raise BadData(f"no list of tools: {fault}", where=str(path), fix="write a JSON list of functions there, in OpenAI's form") from None


def answer_piped(talks: list[Conversation], decoding: Decoding) -> int:
    """What is on stdin is one prompt."""
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise BadData(f"what came on stdin is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise MissingInput("nothing came on stdin", fix="echo 'Hello.' | python -m src.chat PATH")
    one_after_the_other(talks, text, decoding)
    return 0


def one_after_the_other(talks: list[Conversation], text: str, decoding: Decoding) -> None:
    """Each answer as it is made, in pieces that steer nothing."""
    for talk in talks:
        if len(talks) > 1:
            out(f"[{talk.speaker.name}]")
        for part in talk.ask(text, decoding):
            sys.stdout.write(shown(part) if isinstance(part, str) else "\n")
            sys.stdout.flush()
            if isinstance(part, Ended):
                tell_end(part, decoding)


def tell_end(ended: Ended, decoding: Decoding) -> None:
    if ended.finish != "length":
        return
    if ended.tokens is None or ended.tokens >= decoding.max_tokens:
        say(f"[cut off at max_tokens={decoding.max_tokens}]")
    else:
        say(f"[cut off after {ended.tokens} tokens, where the model's context is full]")


class Terminal:
    """The loop of prompts, answers and commands."""

    def __init__(self, talks: list[Conversation], decoding: Decoding, history: Path | None):
        self.talks, self.decoding, self._history = talks, decoding, history
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: out(HELP),
            "clear": lambda _: self._each(Conversation.clear),
            "history": lambda _: self._show(),
            "system": self._system,
            "seed": lambda text: self._set(f"seed {text}"),
            "set": self._set,
            "save": self._save,
            "quit": self._quit,
        }

    def run(self) -> None:
        with self._line_editing():
            for talk in self.talks:
                raw = "; it has no chat template: it goes on with the text you give it" if talk.speaker.raw else ""
                say(f"{talk.speaker.name}{raw}")
            say("/help lists the commands, Ctrl-C ends an answer, Ctrl-D leaves")
            with contextlib.suppress(Leave):
                while True:
                    self._turn()

    def _turn(self) -> None:
        try:
            text, in_a_line = self._prompt()
        except EOFError:
            out("")
            raise Leave from None
        except Interrupted:
            raise
        except KeyboardInterrupt:
            out("\n(/quit or Ctrl-D leaves)")
            return
        try:
            if in_a_line and text.startswith("/"):
                self._command(text)
            elif text.strip():
                self._answer(text)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            out("\n[stopped]")
        except UserError as error:
            tell(f"{error}\n")

    def _prompt(self) -> tuple[str, bool]:
        """(what is typed, whether it is one line, which may be a command)."""
        waits = self.talks[0].open_calls
        text = input(f"result of {shown(waits[0])}> " if waits else "> ")
        if text.strip() != FENCE:
            return text, True
        lines: list[str] = []
        while (line := input(". ")).strip() != FENCE:
            lines.append(line)
        return "\n".join(lines), False

    def _answer(self, text: str) -> None:
        if len(self.talks) > 1 and on_terminal() and sys.stdout.isatty() and (width := console().width) >= NARROW:
            side_by_side(self.talks, text, self.decoding, width)
        else:
            one_after_the_other(self.talks, text, self.decoding)
        for talk in self.talks:
            who = f"{talk.speaker.name} calls" if len(self.talks) > 1 else "calls"
            for call in [c["function"] for c in talk.messages[-1].get("tool_calls", [])]:
                arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items())
                out(f"[{who}] {call['name']}({arguments})")

    # ---- commands

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise ConfigError(f"there is no command /{name}", fix='/help lists them; a prompt that begins with / goes between lines of """')
        self._commands[name](rest.strip())

    def _each(self, work: Callable[[Conversation], Any]) -> None:
        for talk in self.talks:
            work(talk)

    def _quit(self, _: str) -> None:
        raise Leave

    def _system(self, text: str) -> None:
        for talk in self.talks:
            talk.system = text or None

    def _set(self, text: str) -> None:
        if not text:
            out("\n".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in self.decoding.model_dump().items()))
            return
        key, _, given = text.replace("=", " ", 1).partition(" ")
        try:
            value = json.loads(given)
        except ValueError:
            value = given
        value = [value] if key == "stop" and isinstance(value, str) else value
        try:
            self.decoding = Decoding.model_validate(self.decoding.model_dump() | {key: value})
        except ValidationError as error:
            raise ConfigError(f"{key} {given}: {error.errors()[0]['msg']}", fix="/set shows what there is") from None

    def _show(self) -> None:
        for talk in self.talks:
            if len(self.talks) > 1:
                out(f"[{talk.speaker.name}]")
            for number, message in enumerate(talk.whole, len(talk.messages) - len(talk.whole) + 1):
                called = "".join(f" [calls {c['function']['name']}]" for c in message.get("tool_calls", []))
                gone = " (forgotten)" if 0 < number <= talk.forgotten else ""
                out(f"{message['role']}{gone}: {message['content']}{called}")

    def _save(self, text: str) -> None:
        lines = [
            json.dumps({"messages": t.whole} | ({"tools": t.tools} if t.tools else {}), ensure_ascii=False)
            for t in self.talks
            if t.messages
        ]
        if not text or not lines:
            raise ConfigError("there is nothing to save" if text else "where to?", fix="/save FILE, once something was said")
        try:
            with open(text, "x", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise ConfigError(f"{text}: {error.strerror}", fix="/save OTHER_FILE") from None
        out(f"saved {text}")

    @contextlib.contextmanager
    def _line_editing(self) -> Iterator[None]:
        """Arrow keys and what was typed before, which is written nowhere but to the file that was asked for."""
        try:
            import readline
        except ImportError:  # a Python without it
            yield
            return
        readline.set_auto_history(True)
        if self._history is not None and self._history.is_file():
            readline.read_history_file(self._history)
        try:
            yield
        finally:
            if self._history is not None:
                self._history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(self._history)
                self._history.chmod(0o600)


def console():
    from rich.console import Console

    return Console(no_color=None if in_colour() else True)


def side_by_side(talks: list[Conversation], text: str, decoding: Decoding, width: int) -> None:
    """Both answers as they grow, each in a column."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    said, over = ["" for _ in talks], threading.Event()
    ends: list[Ended] = []

    def drawn() -> Table:
        grid = Table(expand=True, show_edge=False, pad_edge=False)
        for talk in talks:
            grid.add_column(shown(talk.speaker.name), ratio=1, overflow="fold")
        grid.add_row(*(Text(shown(one)) for one in said))
        return grid

    def listen(place: int) -> None:
        with contextlib.closing(talks[place].ask(text, decoding)) as parts:  # type: ignore[type-var]
            for part in parts:
                if isinstance(part, Ended):
                    ends.append(part)
                else:
                    said[place] += part
                if over.is_set():
                    return

    with ThreadPoolExecutor(len(talks)) as pool, Live(get_renderable=drawn, console=console(), refresh_per_second=8) as live:
        try:
            for future in [pool.submit(partial(listen, place)) for place in range(len(talks))]:
                future.result()
        finally:
            over.set()
            live.vertical_overflow = "visible"
    for ended in ends:
        tell_end(ended, decoding)


if __name__ == "__main__":
    stage.main_uncomposed("chat", __doc__, ChatVerb, chat)
