"""Reuse of hidden states: an evaluation whose probe leaves the lower layers alone does not run them again.

A model's stack is the one list of equal-class layers that it calls in order. When every tensor that a probe displaces
is read in layer b or later, the hidden states that leave layer b - 1 are those at theta; they are kept for the micro-batch
and for the versions of the tensors below, and the layers below are skipped. The embeddings, the masks and whatever the
model does between layers still run. Results are the same bits: at the first use of each depth both ways are compared, and
where they differ, or the model has no such stack (T5 has two), everything runs in full from then on, which one line says.

Which depths are kept is learned: an evaluation keeps what earlier ones asked for, so nothing is held for methods that
displace all layers, and the first sweep of a block-wise method is the slow one. Memory: batch x length x width numbers
for every depth that is asked for, `every` k-th layer only; gone with the objective that holds them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.directions import Probe
from smidgen.forwards import replaced
from smidgen.loss import Losses
from smidgen.params import ParamView
from smidgen.readers import Reader

log = logging.getLogger("smidgen")

_BEFORE = -1  # depth of what is read before or around the stack


class Held:
    """Hidden states at theta of one micro-batch: by depth p, what leaves layer p - 1."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[Tensor, int, int]] = {}  # hidden states, their version, version of the weights below

    def keep(self, depth: int, hidden: Tensor, weights: int) -> None:
        """Hold the hidden states of one depth, computed at this version of the weights below."""
        self._states[depth] = (hidden, hidden._version, weights)

    def get(self, depth: int, weights: int) -> Tensor | None:
        """The hidden states of one depth, or None when there are none, or they or the weights below changed since."""
        hidden, version, then = self._states.get(depth, (None, 0, 0))
        return hidden if hidden is not None and hidden._version == version and then == weights else None

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(h.numel() * h.element_size() for h, _, _ in self._states.values())


class Reuse:
    """Skips layers of one model. `every`: keep hidden states of every k-th layer; 0 runs everything in full."""

    def __init__(self, view: ParamView, every: int = 1):
        self.view, self.every = view, every
        self.skipped = 0  # layers that were not run, over all evaluations
        self._layers: list[nn.Module] | None = None  # None: not looked for yet; []: nothing to reuse
        self._widths: list[int] = []  # length of each layer's output tuple, 0 for a bare tensor
        self._depths: dict[str, int] = {}  # of a tensor: the first layer that reads it, or _BEFORE
        self._wanted: set[int] = set()
        self._proven: set[int] = set()
        self._shared: set[int] = set()  # depths below which one copy of the rows was found to be enough
        self._reason = ""

    def evaluate(self, held: Held, probe: Probe, run: Callable[[], Losses], again: Callable[[], Losses]) -> Losses:
        """The losses of `run`, an evaluation at theta + probe, with the layers skipped that `held` knows the result of.

        `again` is the same evaluation for the comparison at the first use of a depth; it is not counted as a forward.
        """
        if not self._layers:
            self._say(probe)
            return run()
        depth = self.depth(probe)
        start, state = self._start(held, depth)
        if probe and self.every and depth >= self.every:
            self._wanted.add(depth // self.every * self.every)
        keep = [p for p in self._wanted if start < p <= depth]
        known = not start or start in self._proven
        try:
            with self.skipping(start, state), self._keeping(held, keep):
                found = run()
        except (AttributeError, IndexError, TypeError, ValueError):  # a layer misses what one below hands on beside its tensor
            if known:
                raise
            found = None
        if known and found is not None:
            return found
        full = again()
        if found is None or not torch.equal(found.nll.nan_to_num(), full.nll.nan_to_num()):
            self._give_up(f"skipping the layers below {start} changes the loss")
            self._say(probe)
            return full
        self._proven.add(start)
        return found

    def start(self, probes: Sequence[Probe]) -> int:
        """The layer at which an evaluation of several probes can begin; 0: all layers have to run."""
        if not self._layers or not self.every:
            return 0
        return max(0, min(map(self.depth, probes))) // self.every * self.every

    @contextlib.contextmanager
    def beginning(self, held: Held, start: int, copies: int, base: Callable[[], Any]) -> Iterator[None]:
        """Inside this context a forward of so many copies of the rows begins at layer `start`. The hidden states that enter
        it are those in `held`, or come from `base`, an evaluation of the rows at theta that ends there."""
        state = held.get(start, self._version(start))
        if state is None:
            state = self._below(held, start, base)
        with self.skipping(start, state.repeat(copies, *[1] * (state.ndim - 1))):
            yield

    def _below(self, held: Held, start: int, base: Callable[[], Any]) -> Tensor:
        assert self._layers

        def stop(*_: Any) -> None:
            raise _ReachedError

        with self._keeping(held, [start]), contextlib.suppress(_ReachedError):
            handle = self._layers[start - 1].register_forward_hook(stop)  # after the one that keeps
            try:
                base()
            finally:
                handle.remove()
        state = held.get(start, self._version(start))
        assert state is not None
        return state

    def shared(self, start: int, equal: Callable[[], bool]) -> bool:
        """Whether layers below may be run once for several copies of the rows; the first time `equal` compares both ways.

        A product of more rows may round differently: equal means up to rounding. Where it is not, everything runs in full
        from then on.
        """
        if start not in self._shared:
            try:
                same = equal()
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):  # as in `evaluate`
                same = False
            if same:
                self._shared.add(start)
            else:
                self._give_up(f"running the layers below {start} once for several probes changes the loss")
        return start in self._shared

    def depth(self, probe: Probe) -> int:
        """The first layer that a probe changes: -1 for the embeddings, the number of layers for what follows them."""
        assert self._layers
        names: set[str] = set()
        for z, _ in probe:
            names |= self._depths.keys() if z.support is None else z.support & self._depths.keys()
        return min((self._depths[n] for n in names), default=len(self._layers))

    def _start(self, held: Held, depth: int) -> tuple[int, Tensor | None]:
        for p in sorted((p for p in self._wanted if p <= depth), reverse=True):
            state = held.get(p, self._version(p))
            if state is not None:
                return p, state
        return 0, None

    def _version(self, depth: int) -> int:
        """Grows with every write to a tensor below a depth."""
        return sum(e.version for e in self.view if self._depths[e.name] < depth)

    @property
    def layers(self) -> list[nn.Module]:
        """The stack, in order; empty where there is none, or it is not known yet."""
        return self._layers or []

    @contextlib.contextmanager
    def skipping(self, start: int, state: Tensor | None) -> Iterator[None]:
        """Layers below `start` pass their input on; in the next forward the last of them returns `state`, and lets go of it."""
        assert self._layers is not None
        waiting = [state]
        del state  # copies of the rows are as large as the largest tensor of a layer: nobody but the next layer holds them
        hands_on = [functools.partial(_pass, waiting if i == start - 1 else [], self._widths[i]) for i in range(start)]
        with replaced(zip(self._layers, hands_on, strict=False)):
            yield
            self.skipped += start

    @contextlib.contextmanager
    def _keeping(self, held: Held, depths: Iterable[int]) -> Iterator[None]:
        """What leaves the layers below these depths goes into `held`."""
        assert self._layers is not None
        handles = []
        try:
            for p in depths:
                hook = functools.partial(_keep, held, p, self._version(p))
                handles.append(self._layers[p - 1].register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- the stack ----------------------------------------------------------------------------------------------------

    @property
    def last(self) -> nn.Module | None:
        """The last layer of the stack, where there is one."""
        return self._layers[-1] if self._layers else None

    @property
    def open(self) -> bool:
        """Whether the stack is still to be looked for."""
        return self.every > 0 and self._layers is None

    def locate(self, model: nn.Module, readers: Iterable[Reader], run: Callable[[], Any]) -> None:
        """Find the stack and the depth of each tensor by watching `run`, one evaluation of a few rows."""
        all_stacks = list(stacks(model))
        calls: list[tuple[int, int]] = []
        outputs: dict[tuple[int, int], Any] = {}
        reads: list[tuple[Reader, int]] = []  # and how many layers were done by then
        listed, handles = list(readers), []
        for s, stack in enumerate(all_stacks):
            for i, layer in enumerate(stack):
                handles.append(layer.register_forward_pre_hook(lambda *_, at=(s, i): calls.append(at)))
                handles.append(layer.register_forward_hook(lambda _, __, out, at=(s, i): outputs.update({at: out})))
        for reader in listed:
            if reader.module is not None:
                handles.append(reader.module.register_forward_pre_hook(lambda *_, r=reader: reads.append((r, len(outputs)))))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        used = {s for s, _ in calls}
        stack = all_stacks[used.pop()] if len(used) == 1 else []
        outs = list(outputs.values())
        if (
            not stack
            or [i for _, i in calls] != list(range(len(stack)))
            or not all(isinstance(_first(out), Tensor) for out in outs)
        ):
            self._give_up("the model has no single stack of layers that hand a tensor on")
            return
        self._layers = stack
        self._widths = [len(out) if isinstance(out, tuple) else 0 for out in outs]
        inside = {id(m): i for i, layer in enumerate(stack) for m in layer.modules()}
        called = {id(reader) for reader, _ in reads}
        reads += [(reader, 0) for reader in listed if id(reader) not in called]
        for reader, done in reads:
            depth = inside.get(id(reader.module), len(stack) if done == len(stack) else _BEFORE)
            for entry, _, _ in reader.tensors:
                self._depths[entry.name] = min(depth, self._depths.get(entry.name, depth))

    def _give_up(self, reason: str) -> None:
        self._layers, self._reason = [], reason

    def _say(self, probe: Probe) -> None:
        """One line, once, when a probe could have left layers alone."""
        if self._reason and any(z.support is not None for z, _ in probe):
            log.warning("hidden states are not reused, every evaluation runs in full: %s", self._reason)
            self._reason = ""


class _ReachedError(Exception):
    """An evaluation has come as far as it was wanted."""


def stacks(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Outermost lists of two or more modules of one class."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(layer) for layer in child}) == 1:
            yield list(child)
        else:
            yield from stacks(child)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _pass(state: list[Tensor | None], width: int, *args: Any, **kwargs: Any) -> Any:
    """A layer that is not run: returns the state that is left to it, or its input, in the form of its output."""
    hidden = state.pop() if state else args[0] if args else kwargs["hidden_states"]
    return (hidden, *[None] * (width - 1)) if width else hidden


def _keep(held: Held, depth: int, weights: int, _: nn.Module, __: Any, output: Any) -> None:
    held.keep(depth, _first(output), weights)
