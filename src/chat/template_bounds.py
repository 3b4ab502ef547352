"""Bounds for chat templates, which are programs out of somebody's folder: how often they loop and call, and how much text they make.

Jinja's sandbox (jinja2.sandbox) keeps a template from the machine, not from running for ever: it bounds a range, not ranges within ranges, macros that call
themselves twice, or a text that is doubled sixty times. Here each rendering has a number of steps that follows from its conversation. What is known
before it begins (a loop over a list, a text times a number) is counted then, so nothing is waited for that could not end.
"""

import contextvars
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 50_000
"""of any rendering; further ones for its texts, one a character, and for its messages: gpt-oss's template looks at all others for each of them"""
A_MESSAGE_AND_ANOTHER = 4
CHARACTERS = 16
"""of text made or gone through, that count as a step"""
LITERAL = 256
"""characters of a loop's own text that count as a further step each time"""
LARGEST = 1 << 16
"""for a number that a filter or a text's method is given, such as a width"""
LARGEST_BITS = 1 << 12
"""of a whole number"""
WITH_A_WIDTH = ("center", "indent", "slice", "batch", "wordwrap", "truncate", "tojson", "round")
"""filters whose numbers say how much to make"""

_day: contextvars.ContextVar[date | None] = contextvars.ContextVar("day", default=None)
_left: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar("steps", default=None)


class Endless(TemplateError):
    """A template goes beyond its bounds."""


def install() -> None:
    """Have transformers render every chat template of this process within bounds."""
    from transformers.utils import chat_template_utils

    setattr(chat_template_utils, ImmutableSandboxedEnvironment.__name__, BoundedEnvironment)


def spend(steps: float) -> None:
    """Raises Endless where a rendering has no such number of steps left."""
    if (left := _left.get()) is not None:
        left[0] -= steps
        if left[0] < 0:
            raise Endless("it loops, or makes text, far beyond what the conversation holds")


@contextmanager
def as_of(day: date) -> Iterator[None]:
    """What a template prints of today's date (transformers' strftime_now) is of this day, unless a block around says another."""
    token = _day.set(_day.get() or day)
    try:
        yield
    finally:
        _day.reset(token)


@contextmanager
def _steps(count: float) -> Iterator[None]:
    token = _left.set([count])
    try:
        yield
    finally:
        _left.reset(token)


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + sum(map(_characters, inner))


class _BoundedTemplate(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        return "".join(self.generate(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        given = dict(*args, **kwargs)
        messages = len(given.get("messages") or ())
        with _steps(STEPS + A_MESSAGE_AND_ANOTHER * messages**2 + _characters(list(given.values()))):
            for piece in super().generate(given):
                spend(len(piece) / CHARACTERS)
                yield piece


class _Bounding(NodeTransformer):
    """Puts the count into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData)) // LITERAL
        node.iter = nodes.Filter(node.iter, "bounded_loop", [nodes.Const(cost)], [], None, None)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self.generic_visit(nodes.Filter(nodes.List(node.nodes), "bounded_concat", [], [], None, None))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds."""

    template_class = _BoundedTemplate
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters)
        dict.update(self.filters, bounded_loop=_loop, bounded_concat=_concat)
        self.globals["range"] = _range
        del self.globals["lipsum"]

    def _parse(self, *args: Any) -> nodes.Template:
        tree = _Bounding().visit(super()._parse(*args))
        return tree.set_environment(self)

    def _generate(self, *args: Any, **kwargs: Any) -> str:
        with _steps(STEPS):  # what is constant is worked out now, as far as it goes
            return super()._generate(*args, **kwargs)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        spend(1)
        if isinstance(text := getattr(function, "__self__", None), str):
            _made(text)  # going through it costs as making it did
            _check_numbers(args, kwargs)
            _check_growth(function.__name__, text, args)
        if getattr(function, "__name__", "") == "strftime_now" and (day := _day.get()):
            function = day.strftime
        return _made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return _made(left + right)
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and abs(left) > 1 and right * left.bit_length() > LARGEST_BITS:
            raise Endless(f"{left} to the power of {right} is too large"[:80])
        if operator == "*":
            bits = left.bit_length() + right.bit_length() if whole else 0
            text, times = (left, right) if isinstance(right, int) else (right, left)
            if bits > LARGEST_BITS or (hasattr(text, "__len__") and isinstance(times, int) and len(text) * times > CHARACTERS * STEPS):
                raise Endless("something times a number is too large")
        if operator == "%" and isinstance(left, str):
            _check_width(left, right if isinstance(right, tuple) else ())
        return _made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        work, text = super().wrap_str_format(value), getattr(value, "__self__", None)
        if work is None or not isinstance(text, str):
            return work

        def format(*args: Any, **kwargs: Any) -> str:
            if re.search(r"\d{5}", text):
                raise Endless("a format has too large a width")
            if re.search(r"\{[^}]*\{", text):  # a width of its own
                _check_numbers(args, kwargs)
            return work(*args, **kwargs)

        return format


class _Filters(dict):
    """Filters by name, each within bounds."""

    def __init__(self, filters: dict[str, Callable]):
        super().__init__({name: _bounded(work) for name, work in filters.items()})

    def __setitem__(self, name: str, work: Callable) -> None:
        super().__setitem__(name, _bounded(work))


def _bounded(work: Callable) -> Callable:
    given = 2 if hasattr(work, "jinja_pass_arg") else 1  # the environment, and what is filtered, before the filter's own arguments

    @functools.wraps(work)
    def filter(*args: Any, **kwargs: Any) -> Any:
        value, own = _made(args[given - 1]), args[given:]
        if any(name in work.__name__ for name in WITH_A_WIDTH):
            _check_numbers(own, kwargs)
        if isinstance(value, str):
            if work.__name__ == "do_format":
                _check_width(value, own)
            _check_growth(work.__name__.removeprefix("do_"), value, own)
        if "join" in work.__name__:
            value = list(value) if isinstance(value, Iterable) else value
            args = (*args[: given - 1], value, *own)
            _check_growth("join", str(own[0] if own else kwargs.get("d", "")), [value])
        return _made(work(*args, **kwargs))

    return filter


def _check_numbers(args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > LARGEST:
            raise Endless(f"{value} is too large a number here"[:80])


def _check_width(text: str, values: Iterable[Any]) -> None:
    if any(int(digits[:9]) > LARGEST for digits in re.findall(r"%[^%a-zA-Z]*?(\d{5,})", text)):
        raise Endless("a format has too large a width")
    if "*" in text:  # a width among the values
        _check_numbers(values, {})


def _check_growth(method: str, text: str, args: Any) -> None:
    """Counts what a text will become, before it does."""
    if method == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        spend(text.count(args[0]) * len(args[1]) / CHARACTERS)
    if method == "join" and args and isinstance(args[0], list | tuple):
        spend(sum(len(text) + (len(part) if isinstance(part, str) else 0) for part in args[0]) / CHARACTERS)


def _made(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        spend(len(value) / CHARACTERS)
    return value


@pass_context
def _concat(context: Any, parts: list[Any]) -> str:
    return _made("".join(map(str, parts)))


@pass_context  # so that no constant loop is counted once and for all
def _loop(context: Any, items: Any, cost: int) -> Any:
    try:
        count = len(items)
    except TypeError:
        return _counted(items, cost)
    spend(cost * count)
    return items


def _counted(items: Iterable[Any], cost: int) -> Iterator[Any]:
    for item in items:
        spend(cost)
        yield item


def _range(*args: int) -> range:
    found = range(*args)
    spend(len(found) if found.stop - found.start < 1 << 62 else float("inf"))
    return found
