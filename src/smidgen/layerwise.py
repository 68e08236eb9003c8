"""Evaluation of a model whose layers lie on disk: each is read once for all probes of a step, and let go.

The order is layer by layer: every probe, of every micro-batch, passes one layer before the next is needed, while a thread
reads that one ahead. A pass is the model's own forward in which the layers below hand on the probe's hidden states and those
above are not run (`smidgen.reuse`), so probes see what they see in any forward, bit for bit. What is then held: two layers,
the hidden states of every probe, and the largest tensor's scratch; of embeddings and head the rows and blocks in use. Any
other forward of the model (evaluation, generation, low-rank probes that pass together) reads each layer when it comes to it.

Cost beside the evaluations: the embeddings are looked up once more a layer and probe.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.directions import Probe
from smidgen.kinds import Kind
from smidgen.loss import Losses
from smidgen.near import Near
from smidgen.offload import stack_of, to_shelves
from smidgen.params import ParamView
from smidgen.per_example import Span, varies
from smidgen.probing import Batch, _few
from smidgen.readers import unwrapped
from smidgen.reuse import Held
from smidgen.shelves import Shelves


class Stream:
    """Reads layers ahead in their order and lets go of those that are done. `shelves`: their files, None where the masters are
    in host memory; `near`: copies on the device that computes, None where that is the CPU."""

    def __init__(self, stack: list[nn.Module], shelves: Shelves | None, near: Near | None = None):
        self.stack, self.shelves, self.near = stack, shelves, near
        self.read = 0  # layers fetched so far
        self.kept: int | None = None  # a layer that several forwards pass before it is let go
        self.by_layer = False  # whether forwards run the layer that is kept, and no other
        self._ahead: dict[int, concurrent.futures.Future[None]] = {}
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="shelves")
        for i, layer in enumerate(stack):
            layer.register_forward_pre_hook(functools.partial(self._enter, i))
            layer.register_forward_hook(functools.partial(self._leave, i))

    def take(self, i: int) -> None:
        """Wait until layer i is in memory, and begin to read the next."""
        for at in [at for at in self._ahead if at not in (i, i + 1) or not i]:  # of a forward that went elsewhere
            self._ahead[at].result()
            self.drop(at)
        self._begin(i)
        self._ahead[i].result()
        if i + 1 < len(self.stack):
            self._begin(i + 1)

    def _begin(self, i: int) -> None:
        if i not in self._ahead:
            self.read += 1
            self._ahead[i] = self._reader.submit(self._bring, i)

    def _bring(self, i: int) -> None:
        if self.shelves is not None:
            self.shelves.layers[i].fetch()
        if self.near is not None:
            self.near.load(i)

    def drop(self, i: int) -> None:
        """Let go of layer i."""
        self._ahead.pop(i, None)
        if self.shelves is not None:
            self.shelves.layers[i].release()

    @contextlib.contextmanager
    def keeping(self, i: int) -> Iterator[None]:
        """Inside this context layer i stays in memory."""
        self.take(i)
        self.kept = i
        try:
            yield
        finally:
            self.kept = None
            self.drop(i)

    def _enter(self, i: int, *_: Any) -> None:
        if self.by_layer and i != self.kept:
            return
        if not self.by_layer:
            self.take(i)
        if self.near is not None:
            self.near.show(i)

    def _leave(self, i: int, *_: Any) -> None:
        if self.by_layer and i != self.kept:
            return
        if self.near is not None:
            self.near.hide(i)
        if not self.by_layer:
            self.drop(i)


class _ReachedError(Exception):
    """A forward has come as far as it was wanted."""


class StreamedEngine(BatchedEngine):
    """An engine that takes probes through a model on shelves layer by layer. Probes with factors, which pass together in
    one forward, and directions for each example take the ordinary way.

    Raises ConfigError, at the first use, for a model that cannot be run so: one without a single stack of layers."""

    _whole_layers = False  # layers take turns in the copies that are displaced
    _captures = False

    def __init__(self, model: nn.Module, view: ParamView, kind: Kind, stream: Stream):
        super().__init__(model, view, kind)
        self.stream = stream
        self._compared_layers = False

    def every(
        self, batches: Sequence[Batch], probes: Sequence[Probe], held: Sequence[Held], spans: Sequence[Span]
    ) -> list[list[Losses]]:
        """`together` for several micro-batches, each layer read once for all of them."""
        self._check_once(batches[0])
        if not probes or varies(probes) or (any(probes) and self._thin(probes) and self._reason is None):
            return super().every(batches, probes, held, spans)
        self._locate(batches[0])
        layers = self.reuse.layers
        if not layers:
            raise ConfigError(
                "this model has no single stack of layers, so it cannot be read layer by layer: leave offload out"
            )
        if not self._compared_layers:
            self._compare_layers(batches[0], probes[0], layers)
        pairs = [(batch, probe) for batch in batches for probe in probes]
        counts = self.forwards, self.tokens
        found = self._by_layer(pairs, layers)
        self.forwards, self.tokens = counts
        for batch in batches:
            self.forwards += len(probes)
            self.tokens += len(probes) * (batch["input_ids"].numel() if "input_ids" in batch else 0)
        return [found[at : at + len(probes)] for at in range(0, len(found), len(probes))]

    def _by_layer(self, pairs: Sequence[tuple[Batch, Probe]], layers: list[nn.Module]) -> list[Losses]:
        states: list[Tensor | None] = [None] * len(pairs)
        found = []
        self.stream.by_layer = True
        try:
            for i in range(len(layers)):
                with self.stream.keeping(i):
                    for k, (batch, probe) in enumerate(pairs):
                        states[k] = self._past(batch, probe, layers[i], i, states[k])
            for k, (batch, probe) in enumerate(pairs):
                with self.reuse.skipping(len(layers), states[k]):
                    found.append(self._evaluate(batch, probe))
                states[k] = None
        finally:
            self.stream.by_layer = False
        return found

    def _past(self, batch: Batch, probe: Probe, layer: nn.Module, i: int, state: Tensor | None) -> Tensor:
        """What leaves layer i."""
        kept: list[Tensor] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)
            raise _ReachedError

        handle = layer.register_forward_hook(stop)
        try:
            with contextlib.suppress(_ReachedError), self.reuse.skipping(i, state) if i else contextlib.nullcontext():
                self._evaluate(batch, probe)
        finally:
            handle.remove()
        return kept[0]

    def _compare_layers(self, batch: Batch, probe: Probe, layers: list[nn.Module]) -> None:
        """Once: a few rows, in one forward and layer by layer, must have the same bits."""
        few = _few(batch)
        one = self._uncounted(functools.partial(self._evaluate, few, probe)).nll
        try:
            other = self._uncounted(functools.partial(self._by_layer, [(few, probe)], layers))[0].nll
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"this model cannot be read layer by layer ({error}): leave offload out") from None
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ConfigError("this model hands more from layer to layer than hidden states: leave offload out")
        self._compared_layers = True


def engine_of(model: nn.Module, view: ParamView, kind: Kind) -> BatchedEngine:
    """The engine for a model, wherever its weights lie."""
    stream = getattr(unwrapped(model), "smidgen_stream", None)
    return BatchedEngine(model, view, kind) if stream is None else StreamedEngine(model, view, kind, stream)


def from_disk(model: nn.Module, folder: Path, device: torch.device | None = None) -> None:
    """Let a model that accelerate left on disk run from files in `folder`; on `device`, where that is not the CPU."""
    shelves = to_shelves(model, folder)
    model.smidgen_stream = Stream(shelves.stack, shelves, _near(model, shelves.stack, device))  # type: ignore[assignment]


def from_host(model: nn.Module, device: torch.device) -> None:
    """Keep the layers of a model in (pinned) host memory and run it on `device`. Raises ConfigError for one without a stack."""
    stack = stack_of(model)
    if device.type == "cuda":
        for parameter in (p for layer in stack for p in layer.parameters()):
            parameter.data = parameter.data.pin_memory()
    model.smidgen_stream = Stream(stack, None, _near(model, stack, device))  # type: ignore[assignment]


def _near(model: nn.Module, stack: list[nn.Module], device: torch.device | None) -> Near | None:
    """Copies of the layers on a device; all else moves there for good."""
    if device is None:
        return None
    inside = {id(p) for layer in stack for p in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return Near(stack, device)
