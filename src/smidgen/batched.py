"""Many probes in one forward: P probes x B rows are evaluated as P * B rows with frozen weights.

Theta is read only, and no layer's weight is displaced: what a probe adds to a layer's output is thin (`smidgen.population`).
Any base that multiplies works, also a quantised one: its layers are called as they are. Examples may have probes of their
own (`smidgen.per_example`). Layers below the first that a probe changes are run once, on B rows (`smidgen.reuse`);
the last one runs at label positions only (`smidgen.last_layer`).

Agreement with the sequential engine, which forms W + A B^T: to float32 rounding of the sums (tests state the tolerance); in
16 bits the thin products are more exact, since W + s z is never rounded. Memory: a forward of as many rows, plus the factors;
probes are split into as many forwards as keep an estimate of that under `memory`. Falls back to the sequential engine, with
one line, where a tuned tensor is used in another way or rows of a batch see each other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.directions import Probe, restrict
from smidgen.forwards import replaced
from smidgen.gathered import Gathered, gathered_bytes, subspace_of
from smidgen.graphs import DEVICES
from smidgen.kinds import Kind
from smidgen.last_layer import at_labels, narrow
from smidgen.loss import NOT_INPUTS, Losses, choice_index, criterion_loss, grouped, targets
from smidgen.lowrank import Factored, is_matrix, sides
from smidgen.params import Entry, ParamView
from smidgen.per_example import Span, examples_of, known, of_examples, owners, varies
from smidgen.placed import wrapped
from smidgen.population import (
    NotBatchedError,
    Population,
    PopulationHead,
    after_linear,
    around_embedding,
    around_vectors,
    in_pieces,
    layer_norm,
    linear_like,
    piecewise,
)
from smidgen.probing import Batch, Engine, _few, _on
from smidgen.reuse import Held

log = logging.getLogger("smidgen")

MEMORY = 1 << 30  # bytes of activations of one forward, above which the probes are split into several; chosen
CACHED = 1 << 26  # the same on a CPU, where larger forwards leave its caches: a third more time at 1 GiB (docs/decisions.md)
NARROW = 64  # a matrix whose smaller side is at most this may be displaced by dense noise in a batch; chosen
_FLOAT32 = 1e-3  # tolerance of a loss of one nat in float32; chosen
_LIVE = 4  # tensors as wide as the widest layer that are alive at once in a forward without gradient; measured


def unsupported(engine: Engine) -> str | None:
    """Why the tuned tensors of a model cannot be probed in a batch, or None. Looks at modules, runs nothing."""
    for reader in engine.readers:
        for entry, owner, attribute in reader.tensors:
            if reader.module is not owner:
                return f"{entry.name} is read outside {type(owner).__name__}"
            if wrapped(owner):
                return f"accelerate brings {entry.name} to its layer"
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

    def __init__(self, model: nn.Module, view: ParamView, kind: Kind = "causal", *, memory: int | None = None):
        """memory: bytes of activations of one forward; None: `CACHED` on a CPU (`MEMORY` where it generates), else `MEMORY`."""
        super().__init__(model, view, kind)
        cpu = next((e.tensor.device.type for e in view), "cpu") == "cpu"
        self.memory = memory or (CACHED if cpu else MEMORY)
        self._generating = memory or MEMORY
        self.group: int | None = None  # probes of one forward at most, whatever memory there is
        self._reason: str | None = None  # why probes are evaluated one at a time
        self._compared = False
        self._gathered: dict[tuple[int, int], Gathered] = {}  # by probes and rank
        self._narrow: list[nn.Module] = []  # of the last layer, where they were found to give the same at labels alone

    def together(
        self, batch: Batch, probes: Sequence[Probe], held: Held | None = None, span: Span | None = None
    ) -> list[Losses]:
        """Losses of one micro-batch at theta + each probe. Cost: len(probes) forwards' worth of rows in few calls; probes
        with dense directions in wide matrices, one forward each."""
        if not any(probes) or not self._thin(probes):
            return super().together(batch, probes, held, span)
        if varies(probes):
            known(span)
        if not self._compared:
            self._compare(_few(batch), [probe for probe in probes if probe][:2])
        if self._reason is not None:
            return super().together(batch, probes, held, span)
        size = max(1, min(self.memory // self.bytes_of(batch, probes), self.group or len(probes)))
        parts = [probes[lo : lo + size] for lo in range(0, len(probes), size)]
        return [found for part in parts for found in self._reusing(batch, part, held, span)]

    def _population(self, probes: Sequence[Probe]) -> Population:
        """Some probes; on a device whose launches take longer than small work, drawn at once where they can be."""
        z = subspace_of(probes) if _on(DEVICES, self.view) else None
        if z is None:
            return Population(probes)
        key = len(probes), z.rank
        if key not in self._gathered:
            self._gathered[key] = Gathered(len(probes), z, list(self.view))
        people = self._gathered[key]
        people.put(probes)
        return people

    def call_together(
        self, run: Callable[[Batch], Any], batch: Batch, probes: Sequence[Probe], *, longer: float = 1.0
    ) -> list[Any] | None:
        """What `run` makes of the batch repeated for each probe, in as few calls as memory allows; any calls of the model that
        it makes with these rows, such as `generate`, see each probe's weights. None where probes are evaluated one at a time.

        longer: how many times the batch's tokens a row grows to. Counts a forward a probe.
        """
        if not any(probes) or not self._thin(probes) or varies(probes):
            return None
        if not self._compared:
            self._compare(_few(batch), [probe for probe in probes if probe][:2])
        if self._reason is not None:
            return None
        size = max(1, min(int(self._generating / longer) // self.bytes_of(batch, probes), self.group or len(probes)))
        rows, found = batch["labels"].shape[0], []
        for lo in range(0, len(probes), size):
            people = Population(probes[lo : lo + size])
            with self._evaluating(), self._seen_by(people, len(people) * rows, head=True):
                found.append(run(repeated(batch, len(people))))
        self.forwards += len(probes)
        return found

    def bytes_of(self, batch: Batch, probes: Sequence[Probe]) -> int:
        """Estimate of what a probe adds to the memory of a forward: activations of its rows, logits, dense noise."""
        size = next((p.element_size() for p in self.model.parameters() if p.is_floating_point()), 4)
        total = _tokens(batch) * _LIVE * _widest(self.model, self.head) * size
        if self.own_head:
            total += int((batch["labels"] >= 0).sum()) * _vocabulary(self.head) * 4
        if _on(DEVICES, self.view) and (z := subspace_of(probes)) is not None:
            total += gathered_bytes(z, self.view)
        dense = [e.tensor.numel() for e in self.view if is_matrix(e.tensor.shape) and not _factored(probes, e)]
        return total + 4 * max(dense, default=0) * (examples_of(batch) if varies(probes) else 1)

    def _thin(self, probes: Sequence[Probe]) -> bool:
        """Whether every matrix that the probes displace has factors, or is narrow."""
        return all(_factored(probes, e) or min(sides(e.tensor.shape)) <= NARROW for e in self.view if is_matrix(e.tensor.shape))

    def _reusing(self, batch: Batch, probes: Sequence[Probe], held: Held | None, span: Span | None) -> list[Losses]:
        """`_at_once`, with the layers below the probes run on one copy of the rows."""
        run = functools.partial(self._at_once, batch, probes, span, replay=True)
        if held is None:
            return run()
        self._locate(batch)
        start = self.reuse.start(probes)
        if not start:
            return run()
        base = functools.partial(self._uncounted, functools.partial(self._evaluate, batch, ()))

        def above() -> list[Losses]:
            with self.reuse.beginning(held, start, len(probes), base):
                return run()

        def equal() -> bool:
            return self._gap(self._uncounted(above), self._uncounted(run)) <= _tolerance(self.model)

        return above() if self.reuse.shared(start, equal) else run()

    @staticmethod
    def _gap(some: Sequence[Losses], others: Sequence[Losses]) -> float:
        """Largest difference of a loss; what is NaN on both sides is equal."""
        pairs = [(a.nll.nan_to_num(), b.nll.nan_to_num()) for a, b in zip(some, others, strict=True)]
        return max(float((a - b).abs().max()) for a, b in pairs)

    def _at_once(
        self, batch: Batch, probes: Sequence[Probe], span: Span | None = None, *, replay: bool = False
    ) -> list[Losses]:
        count, rows = len(probes), batch["labels"].shape[0]
        many = repeated(batch, count)
        apart = varies(probes)
        if apart:
            examples = examples_of(batch)
            mine = owners(batch).tolist()
            resolved = _resolved(probes, known(span), examples)
            people = Population([each[n] for each in resolved for n in mine])
        else:
            people = self._population(probes)
        output = self._replayed(many, people) if replay else None
        labels = None if self.kind == "classification" else targets(many["labels"], self.kind)
        of = labels.rows if apart and labels is not None else None
        keep = None if labels is None else labels.keep
        seen = self._seen_by(people, count * rows, of) if output is None else contextlib.nullcontext()
        with self._evaluating(), seen, at_labels(self._narrow, keep):
            if labels is None:
                logits = self._forward(many).logits if output is None else output
                nll = criterion_loss(logits, many["labels"].view(-1), batch)
                where = torch.arange(rows, device=nll.device)
            else:
                hidden, logits = self._hidden(many, labels, output)
                nll = self._population_nll(hidden, logits, labels.tokens, batch, people, of)
                where = targets(batch["labels"], self.kind).rows
        self.forwards += count - 1  # the call above counted one
        return [grouped(Losses(part, where, rows), batch) for part in nll.view(count, -1)]

    def _replayed(self, many: Batch, people: Population) -> Tensor | None:
        """What a captured forward of these rows gives, where there is one."""
        if self.graphs is None or self.own_head or not isinstance(people, Gathered):
            return None
        inputs = self._inputs(many)
        output = self.graphs.output(inputs, people, people, self._population_output)
        if output is not None:
            self._count(inputs)
        return output

    def _population_output(self, inputs: Batch, people: Population) -> Tensor:
        """What a graph keeps of a population's forward; see `_displaced_output`."""
        rows = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
        with self._evaluating(), self._seen_by(people, rows):
            return self._uncounted_output(inputs)

    def _population_nll(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        tokens: Tensor,
        batch: Batch,
        people: Population,
        of: Tensor | None,
    ) -> Tensor:
        choices = batch.get("choices")
        if logits is None:
            assert isinstance(self.head, nn.Linear)
            head = PopulationHead(self.head, self.entry_of, people, of)
            if choices is None:
                return head.nll(hidden, tokens)
            logits = head.logits(hidden, choices)
        elif choices is not None:  # the model's own head was displaced as a linear layer
            logits = logits[:, choices]
        return criterion_loss(logits, tokens if choices is None else choice_index(tokens, choices), batch)

    @contextlib.contextmanager
    def _seen_by(self, people: Population, rows: int, of: Tensor | None = None, *, head: bool = False) -> Iterator[None]:
        """Inside this context a forward of P * B rows sees each probe's weights; `head`: the output head's too. Theta is never
        written. `of`: the row of each label, where rows have probes of their own."""
        skipped = None if self.own_head or head else self.head
        undo = contextlib.ExitStack()
        with undo:
            for reader in self.readers:
                module = reader.module
                tensors = {a: e for e, _, a in reader.tensors if people.touches(e.name)}
                if module is None or module is skipped or not tensors:
                    continue
                if module is self.head and of is not None:  # it is given the hidden states of labels, not of rows
                    undo.callback(module.register_forward_hook(functools.partial(self._own_head, people, of)).remove)
                elif in_pieces(module, people, tensors):
                    undo.enter_context(replaced([(module, functools.partial(piecewise, module, people, tensors))]))  # type: ignore[arg-type]
                elif linear_like(module):
                    undo.callback(module.register_forward_hook(functools.partial(after_linear, people, tensors)).remove)
                elif isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
                    undo.enter_context(replaced([(module, functools.partial(layer_norm, module, people, tensors))]))
                else:
                    if isinstance(module, nn.Embedding):
                        enter, leave = around_embedding(module, people, tensors["weight"], rows)
                    else:
                        enter, leave = around_vectors(module, people, tensors)
                    undo.callback(leave)
                    undo.callback(module.register_forward_pre_hook(enter).remove)
                    undo.callback(module.register_forward_hook(leave).remove)
            yield

    def _far_enough(
        self, few: Batch, probes: Sequence[Probe], base: Tensor, tolerance: float, span: Span
    ) -> tuple[list[Probe], list[Tensor]]:
        """The probes so long that one of them changes a loss by 50 tolerances, and their losses one at a time; in 16 bits by
        100 at most, as far as that is found: further away these losses are chaos, and two ways of rounding differ by nats.
        """
        least, most = 50 * tolerance, 100 * tolerance if tolerance > _FLOAT32 else math.inf
        short, far, longer = 0.0, math.inf, 1.0
        for _ in range(12):
            tried: list[Probe] = [[(z, longer * scale) for z, scale in probe] for probe in probes]
            slow = [found.nll for found in Engine.together(self, few, tried, None, span)]
            moved = max(float((nll - base).abs().max()) for nll in slow)
            if least < moved <= most:
                break
            if moved <= least:
                short = longer
            else:  # not a number, too
                far = longer
            longer = math.sqrt(short * far) if short and far < math.inf else longer * (3.0 if short else 1 / 3.0)
        return tried, slow

    def _own_head(self, people: Population, of: Tensor, module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return PopulationHead(module, self.entry_of, people, of).logits(args[0][0], slice(None))[None].to(out.dtype)

    def _tuned_modules(self) -> set[int]:
        return {id(owner) for reader in self.readers for _, owner, _ in reader.tensors}

    def _compare(self, few: Batch, probes: Sequence[Probe]) -> None:
        """Evaluate two probes on a few rows both ways; a difference or an error means one at a time from now on.

        The probes are made longer until they change the loss well beyond the tolerance: a small step would hide a tensor
        that is not displaced at all.
        """
        self._compared = True
        counts, span = (self.forwards, self.tokens), Span(0, examples_of(few))
        try:
            base = self.losses(few).nll  # also finds the readers
            self._reason = unsupported(self)
            if self._reason is not None:
                return
            tolerance = _tolerance(self.model)
            tried, slow = self._far_enough(few, probes, base, tolerance, span)
            fast = [found.nll for found in self._at_once(few, tried, span)]
            gap = max(float((a - b).abs().max()) for a, b in zip(slow, fast, strict=True))
            if not gap <= tolerance * max(1.0, *(float(nll.abs().max()) for nll in slow)):
                self._reason = f"losses differ by {gap:.2g} from one probe at a time: rows of a batch may see each other"
                return
            self._locate(few)
            self._narrow = [] if self.reuse.last is None else narrow(self.model, self.reuse.last, self._tuned_modules())
            slim = [found.nll for found in self._at_once(few, tried, span)] if self._narrow else fast
            if not max(float((a - b).abs().max()) for a, b in zip(slim, fast, strict=True)) <= tolerance:
                log.info("the last layer runs at all positions: at labels alone it gives other losses")
                self._narrow = []
        except (NotBatchedError, RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            self._reason = str(error).splitlines()[0]
        finally:
            self.forwards, self.tokens = counts
            if self._reason is not None:
                log.warning("probes are evaluated one at a time: %s", self._reason)


def _tolerance(model: nn.Module) -> float:
    """Largest difference of a loss of one nat that rounding explains, by the coarsest dtype of the weights."""
    dtypes = {p.dtype for p in model.parameters()}
    return 0.05 if dtypes & {torch.bfloat16, torch.float16} else _FLOAT32


def repeated(batch: Batch, times: int) -> Batch:
    """The batch once for each probe, probe by probe."""
    return {
        k: v.repeat(times, *[1] * (v.ndim - 1)) if k == "labels" or (isinstance(v, Tensor) and k not in NOT_INPUTS) else v
        for k, v in batch.items()
    }


def _resolved(probes: Sequence[Probe], span: Span, examples: int) -> list[list[Probe]]:
    """The probe of each example, for each probe; mirrored probes get the same objects, which are drawn once."""
    known: dict[int, list[Any]] = {}
    for probe in probes:
        for z, _ in probe:
            if id(z) not in known:
                known[id(z)] = [terms[0][0] for terms in of_examples([(z, 1.0)], span, examples)]
    return [[[(known[id(z)][n], s) for z, s in probe] for n in range(examples)] for probe in probes]


def _factored(probes: Sequence[Probe], entry: Entry) -> bool:
    """Whether a matrix is displaced by products of factors alone, or not at all."""
    for probe in probes:
        for z, _ in restrict(probe, entry.name):
            z = getattr(z, "one", z)
            if not (isinstance(z, Factored) and z.has_factors(entry.name)):
                return False
    return True


def _widest(model: nn.Module, head: nn.Module | None) -> int:
    """Largest side of a linear layer but the head."""
    return max((max(_ends(m)) for m in model.modules() if linear_like(m) and m is not head), default=1)


def _ends(module: Any) -> tuple[int, int]:
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)  # type: ignore[return-value]


def _vocabulary(head: Any) -> int:
    return head.weight.shape[0]


def _tokens(batch: Batch) -> int:
    return batch["input_ids"].numel() if "input_ids" in batch else batch["labels"].shape[0]
