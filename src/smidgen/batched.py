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

import torch
from torch import Tensor, nn

from smidgen.directions import Probe, restrict
from smidgen.kinds import Kind
from smidgen.loss import NOT_INPUTS, Losses, choice_index, grouped, logits_nll, targets
from smidgen.lowrank import Factored, is_matrix
from smidgen.params import ParamView
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
from smidgen.reuse import Held

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


class BatchedEngine(Engine):
    """An engine that evaluates probes with factors together. `together` means what `losses` means, for several probes."""

    def __init__(self, model: nn.Module, view: ParamView, kind: Kind = "causal", *, tokens: int = TOKENS):
        super().__init__(model, view, kind)
        self.most_tokens = tokens
        self._reason: str | None = None  # why probes are evaluated one at a time
        self._compared = False

    def together(self, batch: Batch, probes: Sequence[Probe], held: Held | None = None) -> list[Losses]:
        """Losses of one micro-batch at theta + each probe. Cost: len(probes) forwards' worth of rows in few calls; probes
        with dense directions, one forward each."""
        if not any(probes) or not self._factored(probes):
            return super().together(batch, probes, held)
        if not self._compared:
            self._compare(_few(batch), [probe for probe in probes if probe][:2])
        if self._reason is not None:
            return super().together(batch, probes, held)
        size = max(1, self.most_tokens // max(1, _tokens(batch)))
        return [found for lo in range(0, len(probes), size) for found in self._at_once(batch, probes[lo : lo + size])]

    def _factored(self, probes: Sequence[Probe]) -> bool:
        """Whether every matrix that the probes displace has factors."""
        terms = [(z, entry) for probe in probes for entry in self.view for z, _ in restrict(probe, entry.name)]
        return all(isinstance(z, Factored) and (z.has_factors(e.name) or not is_matrix(e.tensor.shape)) for z, e in terms)

    def _at_once(self, batch: Batch, probes: Sequence[Probe]) -> list[Losses]:
        people = Population(probes)
        many = repeated(batch, len(people))
        rows = batch["labels"].shape[0]
        with self._evaluating(), self._seen_by(people, len(people) * rows):
            if self.kind == "classification":
                nll = logits_nll(self._forward(many).logits, many["labels"].view(-1))
                where = torch.arange(rows, device=nll.device)
            else:
                labels = targets(many["labels"], self.kind)
                hidden, logits = self._hidden(many, labels)
                nll = self._population_nll(hidden, logits, labels.tokens, batch.get("choices"), people)
                where = targets(batch["labels"], self.kind).rows
        self.forwards += len(people) - 1  # the call above counted one
        return [grouped(Losses(part, where, rows), batch) for part in nll.view(len(people), -1)]

    def _population_nll(
        self, hidden: Tensor, logits: Tensor | None, tokens: Tensor, choices: Tensor | None, people: Population
    ) -> Tensor:
        if logits is None:
            assert isinstance(self.head, nn.Linear)
            head = PopulationHead(self.head, self.entry_of, people)
            if choices is None:
                return head.nll(hidden, tokens)
            logits = head.logits(hidden, choices)
        elif choices is not None:  # the model's own head was displaced as a linear layer
            logits = logits[:, choices]
        return logits_nll(logits, tokens if choices is None else choice_index(tokens, choices))

    @contextlib.contextmanager
    def _seen_by(self, people: Population, rows: int) -> Iterator[None]:
        """Inside this context a forward of P * B rows sees each probe's weights. Theta is never written."""
        skipped = None if self.own_head else self.head
        undo = contextlib.ExitStack()
        with undo:
            for reader in self.readers:
                module = reader.module
                tensors = {a: e for e, _, a in reader.tensors if people.touches(e.name)}
                if module is None or module is skipped or not tensors:
                    continue
                if linear_like(module):
                    undo.callback(module.register_forward_hook(functools.partial(after_linear, people, tensors)).remove)
                elif isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
                    undo.callback(module.__dict__.pop, "forward", None)
                    module.forward = functools.partial(layer_norm, module, people, tensors)  # type: ignore[method-assign]
                else:
                    if isinstance(module, nn.Embedding):
                        enter, leave = around_embedding(module, people, tensors["weight"], rows)
                    else:
                        enter, leave = around_vectors(module, people, tensors)
                    undo.callback(leave)
                    undo.callback(module.register_forward_pre_hook(enter).remove)
                    undo.callback(module.register_forward_hook(leave).remove)
            yield

    def _compare(self, few: Batch, probes: Sequence[Probe]) -> None:
        """Evaluate two probes on a few rows both ways; a difference or an error means one at a time from now on.

        The probes are made longer until they change the loss well beyond the tolerance: a small step would hide a tensor
        that is not displaced at all.
        """
        self._compared = True
        counts = self.forwards, self.tokens
        try:
            base = self.losses(few).nll  # also finds the readers
            self._reason = unsupported(self)
            if self._reason is not None:
                return
            tolerance = _tolerance(self.model)
            for longer in (1.0, 10.0, 100.0, 1000.0):
                tried = [[(z, longer * scale) for z, scale in probe] for probe in probes]
                slow = [self.losses(few, probe).nll for probe in tried]
                if all(float((nll - base).abs().max()) > 50 * tolerance for nll in slow):
                    break
            fast = [found.nll for found in self._at_once(few, tried)]
            gap = max(float((a - b).abs().max()) for a, b in zip(slow, fast, strict=True))
            if not gap <= tolerance * max(1.0, *(float(nll.abs().max()) for nll in slow)):
                self._reason = f"losses differ by {gap:.2g} from one probe at a time: rows of a batch may see each other"
        except (NotBatchedError, RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            self._reason = str(error).splitlines()[0]
        finally:
            self.forwards, self.tokens = counts
            if self._reason is not None:
                log.warning("probes are evaluated one at a time: %s", self._reason)


def _tolerance(model: nn.Module) -> float:
    """Largest difference of a loss of one nat that rounding explains, by the coarsest dtype of the weights."""
    dtypes = {p.dtype for p in model.parameters()}
    return 0.05 if dtypes & {torch.bfloat16, torch.float16} else 1e-3


def repeated(batch: Batch, times: int) -> Batch:
    """The batch once for each probe, probe by probe."""
    return {
        k: v.repeat(times, *[1] * (v.ndim - 1)) if k == "labels" or (isinstance(v, Tensor) and k not in NOT_INPUTS) else v
        for k, v in batch.items()
    }


def _tokens(batch: Batch) -> int:
    return batch["input_ids"].numel() if "input_ids" in batch else batch["labels"].shape[0]
