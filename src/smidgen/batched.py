"""Many probes in one forward: P probes x B rows are evaluated as P * B rows with frozen weights.

Theta is read only, and no layer's weight is displaced: what a probe adds to a layer's output is thin (`smidgen.population`).
Any base that multiplies works, also a quantised one: its layers are called as they are.

Agreement with the sequential engine, which forms W + A B^T: to float32 rounding of the sums (tests state the tolerance); in
16 bits the thin products are more exact, since W + s z is never rounded. Memory: a forward of as many rows, plus the factors.
Falls back to the sequential engine, with one line, where a tuned tensor is used in another way or rows of a batch see
each other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.directions import Probe, restrict
from smidgen.loss import Losses, choice_index, grouped, logits_nll, targets
from smidgen.lowrank import Factored
from smidgen.population import (
    NotBatchedError,
    Population,
    PopulationHead,
    after_linear,
    around_embedding,
    around_vectors,
    layer_norm,
    linear_like,
)
from smidgen.probing import Batch, Engine, _few

log = logging.getLogger("smidgen")

TOKENS = 1 << 14  # input tokens of one forward, above which the probes are split into several; chosen


def unsupported(engine: Engine) -> str | None:
    """Why the tuned tensors of a model cannot be probed in a batch, or None. Looks at modules, runs nothing."""
    for reader in engine.readers:
        for entry, owner, attribute in reader.tensors:
            if reader.module is not owner:
                return f"{entry.name} is read outside {type(owner).__name__}"
            vector = entry.tensor.ndim <= 1
            known = linear_like(owner) or isinstance(owner, nn.Embedding) or vector
            if not known:
                return f"{entry.name} belongs to a {type(owner).__name__}"
            if isinstance(owner, nn.Embedding) and owner.max_norm is not None:
                return f"{entry.name} is renormalised when it is read"
            if attribute not in ("weight", "bias"):
                return f"{entry.name} is no weight or bias"
    return None


class BatchedEngine:
    """Batched probing on top of an engine. `losses` has the same meaning as the engine's, for several probes at once."""

    def __init__(self, engine: Engine, tokens: int = TOKENS):
        self.engine, self.tokens = engine, tokens
        self._reason: str | None = None
        self._checked = False

    # -- what may be batched ------------------------------------------------------------------------------------------

    def accepts(self, probes: Sequence[Probe]) -> bool:
        """Whether every matrix that the probes displace has factors."""
        matrices = [e.name for e in self.engine.view if e.tensor.ndim >= 2]
        return all(
            isinstance(z, Factored) and (z.has_factors(name) or _width_one(self.engine.view[name].tensor))
            for probe in probes
            for name in matrices
            for z, _ in restrict(probe, name)
        )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, probes: Sequence[Probe]) -> list[Losses]:
        """Losses of one micro-batch at theta + each probe. Cost: len(probes) forwards' worth of rows in few calls."""
        self._check_once(batch, probes)
        if self._reason is not None:
            return [self.engine.losses(batch, probe) for probe in probes]
        size = max(1, self.tokens // max(1, _tokens(batch)))
        return [found for lo in range(0, len(probes), size) for found in self._losses(batch, probes[lo : lo + size])]

    def _losses(self, batch: Batch, probes: Sequence[Probe]) -> list[Losses]:
        engine, people = self.engine, Population(probes)
        many = repeated(batch, len(people))
        rows = batch["labels"].shape[0]
        with engine._evaluating(), self._displaced(people, len(people) * rows):
            if engine.kind == "classification":
                logits = engine._forward(many).logits
                nll = logits_nll(logits, many["labels"].view(-1))
                where = torch.arange(rows, device=nll.device)
            else:
                labels = targets(many["labels"], engine.kind)
                hidden, logits = engine._hidden(many, labels)
                nll = self._nll(hidden, logits, labels.tokens, batch.get("choices"), people)
                where = targets(batch["labels"], engine.kind).rows
        engine.forwards += len(people) - 1  # the call above counted one
        return [grouped(Losses(part, where, rows), batch) for part in nll.view(len(people), -1)]

    def _nll(self, hidden: Tensor, logits: Tensor | None, tokens: Tensor, choices: Tensor | None, people: Population) -> Tensor:
        if logits is not None:  # the model's own head was displaced as a linear layer
            if choices is None:
                return logits_nll(logits, tokens)
            return logits_nll(logits[:, choices], choice_index(tokens, choices))
        plain = self.engine._head
        assert isinstance(plain, nn.Linear)
        head = PopulationHead(plain, self.engine.entry_of, people)
        if choices is None:
            return head.nll(hidden, tokens)
        return logits_nll(head.logits(hidden, choices), choice_index(tokens, choices))

    @contextlib.contextmanager
    def _displaced(self, people: Population, rows: int) -> Iterator[None]:
        """Inside this context a forward of P * B rows sees each probe's weights. Theta is never written."""
        head = None if self.engine._own_head else self.engine._head
        handles: list[Any] = []
        saved: list[tuple[nn.Module, str, Tensor]] = []
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for reader in self.engine.readers:
                module = reader.module
                if module is None or module is head:
                    continue
                tensors = {a: e for e, _, a in reader.tensors if people.touches(e.name)}
                if not tensors:
                    continue
                if linear_like(module):
                    handles.append(module.register_forward_hook(functools.partial(after_linear, people, tensors)))
                elif isinstance(module, nn.Embedding):
                    enter, leave = around_embedding(module, people, tensors["weight"], rows)
                    saved.append((module, "weight", module.weight))
                    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
                elif isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
                    replaced.append((module, module.__dict__.get("forward")))
                    module.forward = functools.partial(layer_norm, module, people, tensors)  # type: ignore[method-assign]
                else:
                    saved += [(module, a, e.tensor) for a, e in tensors.items()]
                    enter, leave = around_vectors(module, people, tensors)
                    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in replaced:
                module.__dict__.pop("forward") if forward is None else setattr(module, "forward", forward)
            for module, attribute, tensor in saved:
                module._parameters[attribute] = tensor  # type: ignore[assignment]

    # -- self-check ---------------------------------------------------------------------------------------------------

    def _check_once(self, batch: Batch, probes: Sequence[Probe]) -> None:
        """Compare two probes on a few rows with the sequential engine; a difference or an error means falling back."""
        if self._checked:
            return
        self._checked = True
        engine = self.engine
        few = _few(batch)
        counts = engine.forwards, engine.tokens
        self._reason = None
        slow = [engine.losses(few, probe).nll for probe in probes[:2]]  # also finds the readers
        self._reason = unsupported(engine)
        if self._reason is None:
            try:
                fast = [found.nll for found in self._losses(few, probes[:2])]
                gap = max(float((a - b).abs().max()) for a, b in zip(slow, fast, strict=True))
                if not gap <= tolerance(engine):
                    self._reason = f"losses differ by {gap:.2g} from one probe at a time: rows of a batch may see each other"
            except (NotBatchedError, RuntimeError, IndexError, ValueError) as error:
                self._reason = str(error).splitlines()[0]
        engine.forwards, engine.tokens = counts
        if self._reason is not None:
            log.warning("probes are evaluated one at a time: %s", self._reason)


def tolerance(engine: Engine) -> float:
    """Largest difference of a loss (nats) that rounding explains, by the coarsest dtype of the weights."""
    dtypes = {p.dtype for p in engine.model.parameters() if p.is_floating_point()}
    return 0.1 if dtypes & {torch.bfloat16, torch.float16} else 2e-3


def repeated(batch: Batch, times: int) -> Batch:
    """The batch once for each probe, probe by probe."""
    return {
        k: v.repeat(times, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and k != "choices" else v for k, v in batch.items()
    }


def _tokens(batch: Batch) -> int:
    return batch["input_ids"].numel() if "input_ids" in batch else batch["labels"].shape[0]


def _width_one(tensor: Tensor) -> bool:
    return tensor.ndim < 2 or min(tensor.shape[0], tensor.numel() // tensor.shape[0]) == 1
