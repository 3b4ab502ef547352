"""The two programs of a sandbox: one runs a teacher's code, the other the tests of it. A script for `sandbox`, with the standard library alone.

    python sandbox_program.py code READ WRITE < CODE
    python sandbox_program.py tests READ WRITE VERDICT < {"imports": ["import math"], "tests": "assert f(1) == 2"}

Nothing in a process can be kept from code that runs in it, so the code has one of its own: it never sees the tests, their process, or the pipe of the
verdict. The tests call it through two more pipes (READ, WRITE: file descriptors), a line of JSON each way, and what comes back is data, put together anew:
no object of the code's that equals everything, and no name of its own for `abs` or `math`. So a verdict can follow from nothing but what the code answers.

What is no data stays where it is, and is known on the other side as a `Remote`: classes and their instances, functions, iterators.
"""

import ast
import builtins
import code as interpreter
import contextlib
import io
import json
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

PLAIN = (type(None), bool, int, float, str)
CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset)
MUTABLE = (list, dict, set, bytearray)
MADE: dict[tuple[str, str], Callable[[Any], list]] = {
    ("decimal", "Decimal"): lambda value: [str(value)],
    ("fractions", "Fraction"): lambda value: [value.numerator, value.denominator],
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
    ("datetime", "date"): lambda value: [value.year, value.month, value.day],
    ("datetime", "datetime"): lambda value: [*value.timetuple()[:6], value.microsecond],
    ("collections", "deque"): lambda value: [list(value)],
}
"""values of the standard library that are handed over as what makes them"""
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lt", "le", "gt", "ge", "eq")


class Gone(BaseException):
    """The other program has ended."""


class Remote:
    """An object of the other program's. Beside data it equals nothing and has no order."""

    def __init__(self, peer, number):
        self.__dict__.update(_peer=peer, _number=number)

    def __call__(self, *args, **kwargs):
        return self._peer.call(self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__name__", "__doc__", "__enter__", "__exit__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._peer.ask("setattr", self, name, value)

    def __instancecheck__(self, other):
        return isinstance(other, Remote) and self._peer.ask("isinstance", other, self) is True

    def __enter__(self):
        return self.__getattr__("__enter__")()

    def __exit__(self, *_):
        return self.__getattr__("__exit__")(None, None, None)

    def __len__(self):
        return self._peer.ask("len", self)

    def __bool__(self):
        return self._peer.ask("bool", self)

    def __iter__(self):
        return self._peer.ask("iter", self)

    def __next__(self):
        return self._peer.ask("next", self)

    def __getitem__(self, key):
        return self._peer.ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._peer.ask("setitem", self, key, value)

    def __str__(self):
        return str(self._peer.ask("str", self))

    def __repr__(self):
        return str(self._peer.ask("repr", self))

    def __hash__(self):
        return self._number


def _forwarded(name):
    def work(self, other):
        # With data beside it the answer may be an object again, such as a vector doubled, but no data: code that says what it takes to pass
        # (`result - 1.5` is 0) has no result.
        if isinstance(other, Remote):
            return self is other if name == "eq" and self is other else self._peer.ask(name, self, other)
        if name in ("lt", "le", "gt", "ge", "eq"):
            return NotImplemented
        found = self._peer.ask(name, self, other)
        return found if isinstance(found, Remote) else NotImplemented

    return work


for _name in OPERATORS:
    setattr(Remote, f"__{_name}__", _forwarded(_name))


class Peer:
    """One end of the line. serves: {what the other may ask: function}. exports(value): whether an object may be known to the other."""

    def __init__(self, reads, writes, serves, exports):
        self._in, self._out = os.fdopen(reads, "rb"), os.fdopen(writes, "wb")
        self._serves, self._exports = serves, exports
        self._mine, self._remotes = {}, {}
        self.classes = {}
        """exceptions by name that are not Python's own"""

    def ask(self, what, *args):
        """The other's answer; meanwhile what it asks is served."""
        self._send([what, [self.encode(arg) for arg in args]])
        while True:
            kind, value = self._receive()
            if kind == "gives":
                return self.decode(value)
            if kind == "raises":
                raise self._exception(*value)
            self._send(self._served(kind, value))

    def call(self, function, args, kwargs):
        """The function's result; lists, dicts and sets among the arguments are afterwards as it left them."""
        found, after, printed = self.ask("call", function, list(args), kwargs)
        for before, now in zip(args, after):
            if isinstance(before, MUTABLE) and isinstance(now, type(before)) and before != now:
                before.clear()
                refill: Any = before.extend if isinstance(before, list | bytearray) else before.update
                refill(now)
        if printed:
            sys.stdout.write(printed)
        return found

    def serve(self):
        """Answer until the other ends."""
        with contextlib.suppress(Gone):
            while True:
                self._send(self._served(*self._receive()))

    def _served(self, what, args):
        try:
            return ["gives", self.encode(self._serves[what](*map(self.decode, args)))]
        except BaseException as error:
            if isinstance(error, Gone):
                raise
            told = []
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                told = [self.encode(arg) for arg in error.args]
            return ["raises", [[kind.__name__ for kind in type(error).__mro__], told]]

    def _exception(self, names, args):
        """An exception of the first of these classes that is known here."""
        known = (self.classes.get(name) or getattr(builtins, name, None) for name in names)
        kind = next(kind for kind in known if isinstance(kind, type) and issubclass(kind, BaseException))
        try:
            return kind(*map(self.decode, args))
        except TypeError:  # it takes others, as UnicodeDecodeError does
            return RuntimeError(names[0])

    def _send(self, message):
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except OSError:
            raise Gone from None

    def _receive(self):
        if not (line := self._in.readline()):
            raise Gone
        return json.loads(line)

    def encode(self, value):
        """JSON of the value: containers, of a class of the code's too, as Python's own, what is no data as a number to know it by."""
        if isinstance(value, Remote):
            return {"yours": value._number}
        if type(value) in PLAIN:
            return value
        kind: Any
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind.__getitem__(value, slice(None)) if kind is str else kind.__add__(value, 0)
        if isinstance(value, tuple) and isinstance(fields := getattr(value, "_fields", None), tuple):
            return {"named": [type(value).__name__, list(fields), [self.encode(part) for part in tuple.__iter__(value)]]}
        for kind in CONTAINERS:
            if isinstance(value, kind):
                return {kind.__name__: [self.encode(part) for part in kind.__iter__(value)]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(part)] for key, part in dict.items(value)]}
        if type(value) in (bytes, bytearray):
            return {type(value).__name__: value.hex()}
        if type(value) is complex:
            return {"complex": [value.real, value.imag]}
        if type(value) is range:
            return {"range": [value.start, value.stop, value.step]}
        for (module, name), parts in MADE.items():
            if module in sys.modules and type(value) is getattr(sys.modules[module], name):
                return {"made": [module, name, [self.encode(part) for part in parts(value)]]}
        if not self._exports(value):
            raise TypeError(f"a {type(value).__name__} cannot be handed over")
        self._mine[id(value)] = value
        return {"mine": id(value)}

    def decode(self, value):
        if type(value) in PLAIN:
            return value
        ((tag, inner),) = value.items()
        if tag == "yours":
            return self._mine[inner]
        if tag == "mine":
            return self._remotes.setdefault(inner, Remote(self, inner))
        if tag == "dict":
            return {self.decode(key): self.decode(part) for key, part in inner}
        if tag in ("bytes", "bytearray"):
            return getattr(builtins, tag).fromhex(inner)
        if tag == "complex":
            return complex(*inner)
        if tag == "range":
            return range(*inner)
        if tag == "named":
            return _named(*inner[:2])(*map(self.decode, inner[2]))
        if tag == "made":
            module, name, args = inner
            if (module, name) not in MADE:
                raise TypeError(name)
            return getattr(__import__(module), name)(*map(self.decode, args))
        return {kind.__name__: kind for kind in CONTAINERS}[tag](map(self.decode, inner))


def _named(name, fields):
    from collections import namedtuple

    return namedtuple(name, fields, rename=True)


class Program(interpreter.InteractiveInterpreter):
    """A program in a namespace of its own; what it raises is raised."""

    def __init__(self):
        super().__init__({"__name__": "__main__", "__builtins__": builtins})

    def run(self, text, name):
        self.runcode(compile(text, name, "exec"))

    def showtraceback(self):
        raise


# ---- the code's program


def serve_code(reads, writes):
    code, program = sys.stdin.read(), Program()

    def load():
        """Run the code; ({name: value} of what it makes, [its exceptions, each with its bases])."""
        imported = {(alias.asname or alias.name).partition(".")[0] for node in imports(code) for alias in node.names}
        program.run(code, "code.py")
        given, raised = {}, []
        for name, value in program.locals.items():
            own = getattr(value, "__module__", None) == "__main__"
            if name.startswith("__") or isinstance(value, types.ModuleType) or (name in imported and not own):
                continue
            if isinstance(value, type) and issubclass(value, BaseException):
                raised.append([kind.__name__ for kind in value.__mro__])
            # A name that tests take to be Python's own is not the code's to give.
            elif not hasattr(builtins, name) and (isinstance(value, types.FunctionType) or name not in sys.stdlib_module_names):
                given[name] = value
        return given, raised

    def call(function, args, kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            found = function(*args, **kwargs)
        return found, [arg if isinstance(arg, MUTABLE) else None for arg in args], printed.getvalue()

    serves = {name: getattr(builtins, name) for name in ("getattr", "setattr", "isinstance", "len", "bool", "iter", "next", "str", "repr")}
    serves |= {name: getattr(operator, name) for name in (*OPERATORS, "getitem", "setitem")}
    Peer(reads, writes, serves | {"load": load, "call": call, "alive": lambda: True}, exports=lambda value: True).serve()


def imports(code):
    """The import statements of a program, wherever they stand."""
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]


# ---- the tests' program


def run_tests(reads, writes, verdict):
    given, program = json.load(sys.stdin), Program()
    os.set_inheritable(verdict, False)
    peer = Peer(reads, writes, {"call": _call}, exports=callable)
    try:
        for line in given["imports"]:
            with contextlib.suppress(ImportError):
                program.run(line, "imports.py")
        made, raised = peer.ask("load")
        for name, *bases in raised:
            base = next(kind for name in bases if isinstance(kind := peer.classes.get(name) or getattr(builtins, name, None), type))
            made[name] = peer.classes[name] = type(name, (base,), {})
        program.locals.update(made)
        program.run(given["tests"], "tests.py")
        peer.ask("alive")
    finally:
        os.write(verdict, _in_words(sys.exception()).encode())


def _in_words(error):
    if error is None:
        return "passed"
    if isinstance(error, AssertionError):
        return "a test fails"
    if isinstance(error, MemoryError):
        return "takes too much memory"
    return "raises an error" if isinstance(error, Exception) else "ends before its tests do"  # an exit, here or there


def _call(function, args, kwargs):
    """A function of the tests', which is all of theirs that code may use."""
    return function(*args, **kwargs), [], ""


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    role, *fds = sys.argv[1:]
    (serve_code if role == "code" else run_tests)(*map(int, fds))
