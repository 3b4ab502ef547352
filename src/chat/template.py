"""A model's chat template: what it takes, what of a conversation it shows, and where a turn ends.

A template is a program that may print any part of a conversation or none: most print no tool calls, few print reasoning, some drop the system turn.
What it shows is found by rendering the conversation's outline, which has a marker of its own in place of each text, once for each outline.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from src.core.errors import BadData, ConfigError, WrongKind, using
from src.core.files import read_json

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ 'These functions can be called, one a line:\\n<tools>' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    '{{ \'\\n</tools>\\nA call is written as\\n<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call><|im_end|>\\n\' }}{% endif %}'
    "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['reasoning_content'] %}{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""for a tokenizer without a template, or in place of one that does not show all: calls are written as Hermes models write them, which servers can read"""
PROBE = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good morning."}]
THINKING = (
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""what opens and closes reasoning, family by family: Qwen, DeepSeek, GLM and most others; EXAONE Deep; Seed-OSS; Magistral; Gemma 4; Command R7B and A;
Apertus; Apriel"""
INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
OUTLINES = 5_000
"""kept in memory"""
SETTINGS = "chat_settings"
"""the key of tokenizer_config.json that holds what no template can: how reasoning was trained, the day that a template prints"""
USUAL = {"reasoning": "template", "today": "2026-01-01"}
"""without any"""


class Unteachable(BadData):
    """Nothing of a conversation can be taught through this template; the others can."""


@dataclass(frozen=True)
class Outline:
    """What a template shows of the last turn of an outline, an assistant's, and where that turn ends.

    hidden: numbers of earlier user and tool messages that the prompt does not show; system, tools: whether it leaves those out.
    text, reasoning, calls: whether the turn's own parts are shown, true for a part it does not have.
    stop: the special token that ends the turn, None where none does. closing: what the template prints up to and with the stop only once a further
    turn follows, empty where the turn's own rendering has it. behind: what the turn's own rendering has after the stop.
    early: whether the stop also stands within the turn, where a server would end it. faithful: whether the turn stands in history as it is answered.
    """

    hidden: tuple[int, ...] = ()
    system: bool = True
    tools: bool = True
    text: bool = True
    reasoning: bool = True
    calls: bool = True
    stop: str | None = None
    closing: str = ""
    behind: str = ""
    early: bool = False
    faithful: bool = False


@dataclass
class Takes:
    """What a template has to be given. arguments: of tool calls, "object" or "text". ids: whether it prints those of calls. tools: whether always a list."""

    arguments: str = "object"
    ids: bool = False
    tools: bool = False


def bound_templates() -> None:
    """From here on no chat template of this process loops without end (template_bounds)."""
    from src.chat import template_bounds

    template_bounds.install()


@contextmanager
def as_served_today() -> Iterator[None]:
    """Within the block a template prints the true date, as other programs that are compared with us do."""
    from src.chat import template_bounds

    with template_bounds.as_of(date.today()):
        yield


class ChatTemplate:
    """The template of one tokenizer. See `of`."""

    def __init__(self, tokenizer):
        bound_templates()
        self.tokenizer = tokenizer
        settings = USUAL | (tokenizer.init_kwargs.get(SETTINGS) or {})
        self.reasoning, self._day = settings["reasoning"], date.fromisoformat(settings["today"])
        self.takes = Takes()
        self._special, self._added = map(_any_of, (special_tokens(tokenizer), tokenizer.get_added_vocab()))
        self.known_stops = {token for token in map(tokenizer.convert_ids_to_tokens, self._stop_ids()) if token}
        self._stops = set(self.known_stops)
        self._outlines: dict[tuple, Outline] = {}
        self._learn()

    def render(self, messages: Sequence[dict], tools=None, *, prompt: bool = False) -> str:
        """The conversation as text; with prompt=True opened for the assistant's next turn.

        Raises BadData where arguments of a call are no JSON object, Unteachable where the template refuses such turns.
        """
        return self.rendered(self.taken(messages), tools, prompt=prompt)

    def rendered(self, taken: list[dict], tools=None, *, prompt: bool = False) -> str:
        """`render` of messages that are as the template takes them."""
        from jinja2 import TemplateError

        from src.chat import template_bounds

        offered = list(tools) if tools else [] if self.takes.tools else None
        given = {"tools": offered, "tokenize": False, "add_generation_prompt": prompt}
        where = self.tokenizer.name_or_path
        with using(
            "the chat template",
            where,
            "mend chat_template in tokenizer_config.json (or chat_template.jinja), or remove it to train with ChatML",
        ):
            try:
                with template_bounds.as_of(self._day):
                    return self.tokenizer.apply_chat_template(taken, **given)
            except TemplateError as error:
                raise Unteachable(f"the chat template refuses this conversation: {error}") from None

    def taken(self, messages: Sequence[dict], *, anew: bool = False) -> list[dict]:
        """The messages as this template takes them: arguments of calls as objects or text, ids where it prints them, reasoning as the settings say.

        anew: ids of nine digits (Mistral's form) and names of results in place of those given.
        """
        found, open_calls, number = [], [], 0
        for message in messages:
            message = {key: value for key, value in self._reasoned(message).items() if key != "weight"}
            if calls := message.get("tool_calls"):
                message["tool_calls"] = calls = [self._call(call) for call in calls]
                for call in calls:
                    if anew or (self.takes.ids and not call.get("id")):
                        call["id"] = f"{number:09d}"
                    number += 1
                open_calls = list(calls)
            elif message["role"] == "tool" and open_calls:
                call = next((c for c in open_calls if c.get("id") and c["id"] == message.get("tool_call_id")), open_calls[0])
                open_calls.remove(call)
                if call.get("id") and (anew or not message.get("tool_call_id")):
                    message["tool_call_id"] = call["id"]
                if anew:
                    message.setdefault("name", call.get("function", call)["name"])
            found.append(message)
        return found

    def shows(self, messages: Sequence[dict], tools, following: dict | None) -> Outline:
        """What the template shows of messages[-1], an assistant's, after the others. following: the message after it, if there is one."""
        key = (tuple(_outline(m) for m in messages), bool(tools), _outline(following) if following else None)
        if key not in self._outlines:
            if len(self._outlines) > OUTLINES:
                self._outlines.clear()
            self._outlines[key] = self._show(messages, tools, following)
        return self._outlines[key]

    def opening(self, message: dict, tools) -> str | None:
        """What stands before the first message of a conversation that the assistant begins, where that is a prompt; else None."""
        asked = _marked([PROBE[0]])
        before, after = self._tried(asked), self._tried(asked, prompt=True)
        whole = self._tried(_marked([message]), tools)
        if not (before and after and whole and after.startswith(before)):
            return None
        generation, place = after[len(before) :], whole.find(_mark(0))
        return whole[:place] if generation.strip() and place > 0 and whole[:place].endswith(generation) else None

    def after(self, prompt: str, full: str, *, asked: str, thought: str) -> str | None:
        """What a model has to produce after `prompt`, of the rendering `full` that also shows its answer; None where that cannot be told.

        asked: the text of the message before. thought: the turn's reasoning, for a template that does not show what its prompt opens.
        """
        k = _shared(prompt, full)
        k = min([k, *_cut_tags(prompt, k), *_cut_tags(full, k)])
        opener, rest = prompt[k:], full[k:]
        for opens, closes in THINKING:
            mark, end = re.escape(opens), re.escape(closes)
            before, _, said = rest.partition(closes)
            closed = closes in rest and not self._special.search(before.replace(opens, ""))  # in front of the text, not behind it
            if not opener.strip() and prompt.rstrip().endswith(opens):
                return rest if closed else _closed(thought, closes, rest)
            if re.fullmatch(rf"\s*{mark}\s*", opener):
                if closed and not before.strip():
                    return thought + rest
                return rest if closed and thought and before.lstrip().startswith(thought) else _closed(thought, closes, rest)
            if shut := re.fullmatch(rf"\s*(?:{mark}\s*)?{end}(\s*)", opener):
                return said.removeprefix(shut[1]) if closed else rest
        if not opener.strip():
            return rest
        # History may have white space more, a prompt a marker more, or the question may stand otherwise in it.
        if rest.lstrip().startswith(opener.lstrip()):
            return rest.lstrip()[len(opener.lstrip()) :]
        if not self._special.sub("", opener).strip():
            return rest
        asked = asked.strip()
        if not asked or asked not in prompt:
            return None
        anchor = asked + prompt.rpartition(asked)[2]
        place = full.rfind(anchor)
        return full[place + len(anchor) :] if place >= 0 else None

    @property
    def turn_end(self) -> str:
        """The token that ends a plain answer. Raises WrongKind where none does, BadData where the template cannot show one."""
        for probe, prompt in ((PROBE[:1], True), (PROBE, False)):
            self.render(probe, prompt=prompt)
        if stop := self.shows(PROBE, None, None).stop:
            return stop
        raise WrongKind(
            "the chat template does not end an assistant turn with a special token, so a tuned model could not learn to stop",
            where=str(self.tokenizer.name_or_path),
            fix="remove chat_template from tokenizer_config.json (and chat_template.jinja) to train with ChatML",
        )

    @cached_property
    def stops(self) -> list[str]:
        """Tokens that end a turn: a plain answer's first, then one of a turn that calls, where that is another."""
        calling = _marked([PROBE[0], PROBE[1] | {"content": "", "tool_calls": [{}]}])
        shown = self.shows(calling, [TOOL], None)
        return list(dict.fromkeys([self.turn_end, *([shown.stop] if shown.calls and shown.stop and not shown.early else [])]))

    def without_markers(self, text: str) -> str:
        """A generated text without special tokens."""
        return self._special.sub("", text)

    @property
    def thinking(self) -> tuple[str, str]:
        """What opens and closes reasoning in this family."""
        text = str(self.tokenizer.chat_template)
        vocabulary = self.tokenizer.get_added_vocab()
        return next((pair for pair in THINKING if pair[0] in text or pair[0] in vocabulary), THINKING[0])

    @property
    def dated(self) -> bool:
        """Whether the template prints today's date."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    # ---- how

    def _tried(self, messages: list[dict], tools=None, *, prompt: bool = False) -> str | None:
        try:
            return self.rendered(self.taken(messages), tools, prompt=prompt)
        except BadData:
            return None

    def _learn(self) -> None:
        """Find what the template takes, by trying it."""
        if self._tried(PROBE) is None:
            self.takes.tools = True
            if self._tried(PROBE) is None:
                self.takes.tools = False
                return  # it shows no chat at all; whoever renders with it is told why
        calling = _marked([PROBE[0], PROBE[1] | {"content": "", "tool_calls": [{}]}])
        as_object = self._tried(calling, [TOOL])
        if as_object is None or repr(_arguments(1, 0)) in as_object:
            self.takes.arguments = "text"
            if self._tried(calling, [TOOL]) is None:
                self.takes.arguments = "object"
        self.takes.ids = "123456789" in (self._tried(_with_ids(calling), [TOOL]) or "")
        if stop := self.shows(PROBE, None, None).stop:
            self._stops.add(stop)

    def _show(self, messages: Sequence[dict], tools, following: dict | None) -> Outline:
        i = len(messages) - 1
        marked = _marked(messages)
        tools = [TOOL] if tools else None
        head = self.opening(messages[0], tools) if not i else self._tried(marked[:i], tools, prompt=True)
        full = self._tried(marked, tools)
        if head is None or full is None:
            return Outline()
        turn = marked[i]
        own = self.after(head, full, asked=marked[i - 1]["content"] if i else "", thought=reasoning_of(turn)[0])
        if own is None:
            return Outline()
        seen = lambda part: part in own
        calls = [_mark(i, f"call{k}") for k in range(len(turn.get("tool_calls") or ()))]
        reasons = self.reasoning != "drop" and ("reasoning_content" in turn or INLINE.match(turn["content"]))
        then = following and following["role"] in ("user", "tool") and _marked([*messages, following])[-1]
        if not then:
            then = {"role": "tool", "content": _mark(i + 1)} if calls else {"role": "user", "content": _mark(i + 1)}
        further = (self._tried([*marked, one], tools) or "" for one in (then, {"role": "user", "content": _mark(i + 1)}))
        later = next((text for text in further if _mark(i + 1) in text), "")  # one that it does not show is no further turn
        marks = [_mark(i), _mark(i, "reasoning"), *calls]
        ends = _behind(own, marks)
        goes_on = _behind(later.partition(_mark(i + 1))[0], marks)
        stop, closing = self._stop(ends, goes_on)
        within, answer = own, own + closing
        if stop and not closing:
            within, answer = own[: own.rfind(stop)], own[: own.rfind(stop) + len(stop)]
        return Outline(
            hidden=tuple(j for j, m in enumerate(marked[:i]) if m["role"] in ("user", "tool") and m["content"] and _mark(j) not in head),
            system=all(_mark(j) in head for j, m in enumerate(marked[:i]) if m["role"] == "system" and m["content"]),
            tools=not tools or TOOL["function"]["description"] in head,
            text=not turn["content"] or seen(_mark(i)),
            reasoning=not reasons or seen(_mark(i, "reasoning")),
            calls=all(map(seen, calls)),
            stop=stop,
            closing=closing,
            behind=own[len(answer) :],
            early=stop is not None and stop in within,
            faithful=full.startswith(head) and later.startswith(head + answer),
        )

    def _stop(self, ends: str, goes_on: str) -> tuple[str | None, str]:
        """(the token that ends a turn, what has to be added for it), from what follows the turn's last text by itself and before a further turn."""
        for tokens in (self._special, self._added):
            own: list[str] = tokens.findall(ends)
            history: list[str] = tokens.findall(goes_on)
            for found in ([token for token in own if token in history][::-1], own):
                if found:
                    return next((token for token in found if token in self._stops), found[0]), ""
            if history:
                return history[0], goes_on[_shared(ends, goes_on) : goes_on.index(history[0]) + len(history[0])]
        return None, ""

    def _reasoned(self, message: dict) -> dict:
        """The message with its reasoning where `reasoning` says it belongs."""
        if self.reasoning == "template" or message["role"] != "assistant":
            return message
        thought, said = reasoning_of(message)
        rest = {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": said}
        if self.reasoning == "drop" or not thought:
            return rest
        opens, closes = self.thinking
        return rest | {"content": f"{opens}\n{thought}\n{closes}\n\n{said}"}

    def _call(self, call: dict) -> dict:
        """The call with its arguments as the template takes them."""
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise BadData(f"a tool call's arguments are no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise BadData("a tool call's arguments are no JSON object")
        if self.takes.arguments == "text":
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = function | {"arguments": arguments}
        return call | {"function": function} if "function" in call else function

    def _stop_ids(self) -> Iterator[int]:
        """Ids at which servers of this model stop: its generation_config.json's, or its config.json's, and the tokenizer's eos."""
        folder = Path(self.tokenizer.name_or_path)
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                with using("the stop tokens", folder / name):
                    found = read_json(folder / name).get("eos_token_id")
                yield from (i for i in (found if isinstance(found, list) else [found]) if type(i) is int and 0 <= i < len(self.tokenizer))
                break
        if self.tokenizer.eos_token_id is not None:
            yield self.tokenizer.eos_token_id


def of(tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer, looked into once."""
    return _of(tokenizer, str(tokenizer.chat_template), json.dumps(tokenizer.init_kwargs.get(SETTINGS)), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _of(tokenizer, *_: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def reasoning_of(message: dict) -> tuple[str, str]:
    """(what an assistant thought, what it said), of a message that has its reasoning in a field or in front of its text; "" where it has none."""
    content, thought = message.get("content") or "", message.get("reasoning_content") or ""
    if not thought and (inline := INLINE.match(content)):
        return inline[1].strip(), content[inline.end() :]
    return thought, content


def text_of(folder: Path) -> str | None:
    """The chat template in a model's folder, None where it has none."""
    if (folder / "chat_template.jinja").is_file():
        with using("the chat template", folder / "chat_template.jinja"):
            return (folder / "chat_template.jinja").read_text("utf-8")
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    text = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(text, list):  # several, by name
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    return text if isinstance(text, str) else None


def check_keywords(text: str | None, keywords: dict) -> None:
    """Raises ConfigError for keywords that a template does not read."""
    own = {"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception", "bos_token", "eos_token"}
    own |= {"documents", "continue_final_message"}  # transformers sets or takes these itself, so no default reaches the template
    read = sorted(_keywords(text or "") - own)
    if unknown := [word for word in keywords if word not in read]:
        near = difflib.get_close_matches(unknown[0], read, 1)
        raise ConfigError(
            f"the chat template does not read {', '.join(unknown)}" + (f"; did you mean '{near[0]}'?" if near else ""),
            where=f"template.{unknown[0]}",
            fix=f"it reads {', '.join(read)}" if read else "template={}: it reads no keyword",
        )


def _keywords(text: str) -> set[str]:
    """Names that a template reads and does not set."""
    from jinja2 import Environment, TemplateError, meta

    text = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1\2#}", text)  # transformers' own tag
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text))
    except TemplateError:  # whoever renders it is told why
        return set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text))


def with_defaults(text: str, keywords: dict) -> str:
    """The template with values for keywords that whoever renders it does not give."""
    given = "".join(
        f"{{%- if {word} is not defined %}}{{%- set {word} = {_literal(value)} %}}{{%- endif %}}"
        for word, value in sorted(keywords.items())
    )
    return given + ("{#--#}" if given else "") + text


def _literal(value: object) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def said_apart(text: str, tags: tuple[tuple[str, str], ...] = THINKING[:4]) -> tuple[str, str]:
    """(what a model said, what it thought before), of a generated text.

    A text that only closes its reasoning, with the closing tag at the end of a line, was opened by its prompt. tags: what opens and closes reasoning.
    """
    for opens, closes in tags:
        before, found, after = text.partition(closes)
        opened = before.lstrip().startswith(opens)
        thought = before.lstrip().removeprefix(opens)
        if found and opens not in thought and closes not in after and (opened or after.startswith("\n")):
            return after.strip(), thought.strip()
    return text, ""


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Qzxtoolsxzq",
        "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "a text"}}, "required": ["q"]},
    },
}


def _shared(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _behind(text: str, marks: list[str]) -> str:
    """What stands behind the last of the marks that are in a text."""
    return text[max((text.rfind(mark) + len(mark) for mark in marks if mark in text), default=0) :]


def _cut_tags(text: str, k: int) -> Iterator[int]:
    """Where a tag of reasoning begins that position k cuts in two."""
    for tag in (tag for pair in THINKING for tag in pair):
        at = text.find(tag, max(0, k - len(tag) + 1), k + len(tag) - 1)
        if 0 <= at < k < at + len(tag):
            yield at


def _closed(thought: str, closes: str, rest: str) -> str:
    """An answer within opened reasoning: the reasoning, what closes it, the text."""
    said = INLINE.sub("", rest, count=1) if INLINE.match(rest) else rest
    return f"{thought.strip()}\n{closes}" + ("\n" if closes.startswith("[") else "\n\n") + said.lstrip("\n")


def _mark(number: int, part: str = "") -> str:
    return f"Qz{number}x{part}zQ"


def _arguments(number: int, k: int) -> dict:
    return {"q": _mark(number, f"call{k}")}


def _outline(message: dict) -> tuple:
    content = message.get("content") or ""
    kind = 2 if INLINE.match(content) else 1 if content.strip() else 0
    return (
        message["role"],
        kind,
        bool(INLINE.sub("", content).strip()) if kind == 2 else None,
        bool(message.get("reasoning_content")),
        len(message.get("tool_calls") or ()),
        bool(message.get("name")),
    )


def _marked(messages: Sequence[dict]) -> list[dict[str, Any]]:
    """The outline of messages: each text is a marker."""
    found: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, kind, said, thought, calls, named = _outline(message)
        content = ["", _mark(i), f"<think>\n{_mark(i, 'reasoning')}\n</think>\n\n" + (_mark(i) if said else "")][kind]
        marked: dict[str, Any] = {"role": role, "content": content}
        if thought:
            marked["reasoning_content"] = _mark(i, "reasoning")
        if calls:
            marked["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": _arguments(i, k)}} for k in range(calls)]
        if named:
            marked["name"] = "look"
        found.append(marked)
    return found


def _with_ids(messages: list[dict]) -> list[dict]:
    return [m | {"tool_calls": [c | {"id": "123456789"} for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def special_tokens(tokenizer) -> set[str]:
    """Tokens that are no text: the special ones, but for <unk>."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {tokenizer.unk_token}


def _any_of(tokens) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
