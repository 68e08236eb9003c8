"""Evaluations on a CUDA device as graphs: captured once for each shape of a batch, then replayed.

A forward of a language model is some hundreds of small kernels. Launching them, and our hooks around every layer, takes the CPU
longer than a batch of short rows takes the device; a replay takes neither. What is captured is a forward of the model at
theta + scale * z with the address of z and the scale in the device's memory (`directions.InMemory`), so that one graph serves
all dense directions of one distribution and support; or of a population whose factors lie in memory that stays
(`smidgen.gathered`). The output head is applied outside: label positions vary.

Whether an evaluation is replayed depends on the shapes of its batch and its probe, never on what ran before, since a resumed
run must get the same bits: within a capture transformers makes attention masks explicit, so that another kernel may run.

Run without a graph: evaluations outside a step; sums of directions and masked ones, with what is compared with them; a model on
several devices; one with hooks or replaced forwards that were not there at the self-check; and, which one line says, one whose
forward cannot be captured because it waits for the device. The first graph is compared with an ordinary evaluation. Memory:
the activations of a forward, kept for all graphs together, and each graph's inputs.

Measured on an H200, OPT-1.3B's shape in bfloat16, 16 x 64 tokens: a step of zo_sgd takes 27 ms with graphs, 91 without, of
which the device works 20; two plain forwards, 23 (docs/decisions.md).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smidgen import noise
from smidgen.directions import Dense, InMemory, Probe
from smidgen.scratch import Scratch

log = logging.getLogger("smidgen")

KEPT = 64  # graphs of one model; chosen: the shapes of batches that are grouped by length are fewer
DEVICES = ("cuda",)

Inputs = dict[str, Any]
Run = Callable[[Inputs, Any], Tensor]


class CannotReplayError(Exception):
    """What an evaluation returns cannot be kept by a graph."""


class _Graph(NamedTuple):
    replay: Callable[[], Any]
    inputs: Inputs
    output: Tensor
    seen: Any  # whose memory its kernels read
    tables: list[Tensor]  # that its kernels read
    buffers: dict[Any, Tensor]  # scratch, when it was captured


class Graphs:
    """The captured evaluations of one model."""

    def __init__(self, model: nn.Module, scratch: Scratch):
        self.model, self.scratch = model, scratch
        self.reason: str | None = None  # why nothing is captured (any more)
        if len({p.device for p in model.parameters()}) > 1:
            self.reason = "the model is on several devices"
        self._modules = list(model.modules())
        self.known = attached(self._modules)  # hooks that are part of it
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._directions: dict[Hashable, InMemory | None] = {}
        self._state: tuple[int, ...] = ()
        self._pool: Any = None

    def dense(self, inputs: Inputs, probe: Probe, run: Run) -> Tensor | None:
        """`output` at theta + probe, a replayable one: `run` is given a probe that reads its address and scale from memory."""
        kind = _kind(probe)
        if kind not in self._directions:
            self._directions[kind] = self._in_memory(probe)
        direction = self._directions[kind]
        if direction is not None:
            z, scale = probe[0]
            assert isinstance(z, Dense)
            direction.put(z, scale)
        return self.output(inputs, kind, [(direction, 1.0)] if direction is not None else (), run)

    def _in_memory(self, probe: Probe) -> InMemory | None:
        if not probe:
            return None
        z = probe[0][0]
        assert isinstance(z, Dense)
        record = noise.Held(torch.zeros(6, dtype=torch.int32, device=next(self.model.parameters()).device))
        return InMemory(z.ids, z.distribution, z.support, record)

    def output(self, inputs: Inputs, kind: Hashable, seen: Any, run: Run) -> Tensor | None:
        """What `run(inputs, seen)` returns, valid until the next call; None where it has to be run in the ordinary way.

        `run` is a forward that reads nothing but its inputs, the weights and memory that stays: that of `seen`, which lives as
        long as the graph. Forwards of one `kind` with inputs of the same shapes launch the same kernels.
        """
        if self.reason is not None or attached(self._modules) != self.known:
            return None
        state = self._pointers()
        if state != self._state:
            self._graphs.clear()
            self._state = state
        key = (_shapes(inputs), kind)
        graph = self._graphs.get(key)
        if graph is None or any(self.scratch.buffers.get(slot) is not buffer for slot, buffer in graph.buffers.items()):
            try:
                graph = self._capture(inputs, seen, run)
            except (RuntimeError, CannotReplayError) as error:
                self.reason = str(error).strip().splitlines()[0]
                log.warning("evaluations are not captured as CUDA graphs: %s", self.reason)
                self._graphs.clear()
                return None
            self._graphs[key] = graph
            while len(self._graphs) > KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                graph.inputs[name].copy_(value, non_blocking=True)
        graph.replay()
        return graph.output

    def _capture(self, inputs: Inputs, seen: Any, run: Run) -> _Graph:
        still: Inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        buffers = None
        while buffers != (now := {slot: buffer.data_ptr() for slot, buffer in self.scratch.buffers.items()}):
            buffers = now
            plain = run(still, seen)  # compiles kernels, and makes scratch and tables for it: no capture can do that
            output = self.scratch.like("graph", plain)
        replay, self._pool = record_graph(lambda: output.copy_(run(still, seen)), self._pool)
        if not self._graphs:
            replay()
            ours, theirs = output.float().nan_to_num(), plain.float().nan_to_num()  # padding may hold anything
            gap = float((ours - theirs).norm() / theirs.norm())
            allowed = 1e-3 if plain.dtype == torch.float32 else 5e-2  # relative; roundings differ by 1e-6 and 1e-2 at most
            if not gap <= allowed:
                raise CannotReplayError(f"a replay differs from an evaluation by {gap:.2g}")
        return _Graph(replay, still, output, seen, _tables(), dict(self.scratch.buffers))

    def _pointers(self) -> tuple[int, ...]:
        """Where the weights lie that captured kernels read."""
        parts = (t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        return tuple(t.data_ptr() for t in parts)


def record_graph(run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """(a function that does on the device what `run` launches, the memory pool that graphs share).

    Raises RuntimeError for what cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(torch.cuda.current_stream()),  # comes back also from a capture that fails
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        run()
    return graph.replay, graph.pool()


def _tables() -> list[Tensor]:
    if noise.backend("cuda") != "triton":
        return []
    from smidgen.noise import cuda_many

    return cuda_many.tables()


def attached(modules: Iterable[nn.Module]) -> set[Any]:
    """Hooks and replaced forwards of modules."""
    found: set[Any] = set()
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            found |= {(id(module), key) for key in (*module._forward_hooks, *module._forward_pre_hooks)}
        if "forward" in module.__dict__:
            found.add((id(module), id(module.__dict__["forward"])))
    return found


def replayable(probe: Probe) -> bool:
    """Whether a probe is theta itself or one dense direction."""
    return not probe or (len(probe) == 1 and type(probe[0][0]) is Dense)


def _kind(probe: Probe) -> Any:
    """What is the same in all probes that one graph serves."""
    if not probe:
        return None
    z = probe[0][0]
    assert isinstance(z, Dense)
    return z.distribution, z.support, tuple(z.ids.values())


def _shapes(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((k, (v.shape, v.dtype) if isinstance(v, Tensor) else v) for k, v in inputs.items())
