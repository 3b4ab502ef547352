"""Passes through a layer that wait at some of its modules: what lies between two of them is computed once, by what the layer's weights have become meanwhile.

Each is a thread of its own, since a model's code can be stopped in no other way; one of them runs at a time, and only while it is waited for.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from src.models.by_layer import ByLayer, Pass, Reached
from src.models.devices import trim

_local = threading.local()


class Waiting:
    """A pass that stops before each of some modules where it comes for the first time; see `waiting`."""

    def __init__(self, pool: ThreadPoolExecutor, model: ByLayer, number: int, each: Pass, left: set[nn.Module]):
        """left: modules that it need not wait at any longer; the caller adds to them."""
        self._left, self._go, self._stopped = left, threading.Semaphore(0), threading.Semaphore(0)
        self._module: nn.Module | None = None
        self._given = torch.empty(0)
        self._ends = self._ended = False
        self._work = pool.submit(self._run, model, number, each)

    def at(self, module: nn.Module) -> torch.Tensor | None:
        """What comes into a module; None where the pass waits at another one, or has ended."""
        if self._module is None or self._module in self._left:
            self._resume()
        return self._given if self._module is module else None

    def end(self) -> torch.Tensor:
        """The layer's hidden states, no module being left to wait at."""
        self._resume()
        return self._work.result()

    def close(self) -> None:
        """Ends the pass, wherever it is."""
        self._ends = True
        self._go.release()

    def _resume(self) -> None:
        if not self._ended:
            self._module, self._given = None, torch.empty(0)
            self._go.release()
            self._stopped.acquire()
            trim()  # what a pass has let go lies scattered among what it holds, and the next would take other memory
        if self._ended:
            self._work.result()  # which raises what the pass did

    def _run(self, model: ByLayer, number: int, each: Pass) -> torch.Tensor:
        _local.one = self
        try:
            with contextlib.suppress(Reached), torch.no_grad():
                self._wait()
                return model.call(number, each)
            return torch.empty(0)
        finally:
            self._given = torch.empty(0)
            self._ended = True
            self._stopped.release()

    def come(self, module: nn.Module, given: tuple) -> None:
        """The pass has come to a module."""
        if module not in self._left:
            self._module, self._given = module, given[0]
            self._stopped.release()
            self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._ends:
            raise Reached


@contextlib.contextmanager
def waiting(model: ByLayer, number: int, passes: Sequence[Pass], modules: list[nn.Module], left: set[nn.Module]) -> Iterator[list[Waiting]]:
    """Each of the passes at the beginning of a layer, which has to be held, to wait at these modules but for those in `left`."""

    def stop(module, given) -> None:
        if one := getattr(_local, "one", None):
            one.come(module, given)

    hooks = [module.register_forward_pre_hook(stop) for module in modules]
    found: list[Waiting] = []
    with ThreadPoolExecutor(max(1, len(passes))) as pool:
        try:
            found += [Waiting(pool, model, number, each, left) for each in passes]
            yield found
        finally:
            for one in found:
                one.close()
            for hook in hooks:
                hook.remove()
