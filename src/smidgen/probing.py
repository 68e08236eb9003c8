"""Evaluate a model at theta + probe while theta stays untouched, bit for bit.

The sequential engine: one probe at a time. Every tuned tensor is replaced, for the duration of the innermost module
forward that reads it, by a displaced copy in scratch memory. Three kinds of reader:

- an embedding displaces only the rows it looks up;
- the output head is applied by `smidgen.loss`, in displaced blocks of the vocabulary, at label positions only;
- any other module gets its tensors displaced in a scratch buffer that all such modules share; on CUDA, where a launch costs
  more than the noise of a small tensor, a whole layer of the model does, at once.

Which module reads a tensor is found by a self-check, see `smidgen.readers`.

Cost of an evaluation: one forward and one pass of the noise generator over the tensors that it reads. Scratch: the
largest group of tensors that one module reads, at most the largest tuned tensor for ordinary models; on CUDA one layer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.directions import Direction, Probe
from smidgen.forward_mode import Tangent, differentiated, plain_kernels_notice, slopes
from smidgen.graphs import DEVICES, CannotReplayError, Graphs, attached, replayable
from smidgen.kinds import Kind
from smidgen.linear import fast, layers
from smidgen.lookup import Displaced, Lens, LensedHead, LookedUp
from smidgen.loss import (
    IGNORE,
    NOT_INPUTS,
    Losses,
    PlainHead,
    choice_index,
    choice_logits,
    criterion_loss,
    grouped,
    head_nll,
    head_nll_differentiable,
    targets,
)
from smidgen.modes import evaluation_mode
from smidgen.params import Entry, ParamView
from smidgen.per_example import Span, known, one_by_one, varies
from smidgen.placed import around, wrapped
from smidgen.readers import Reader, Readers, of_layers, unwrapped
from smidgen.reuse import Held, Reuse, stacks
from smidgen.scratch import Scratch
from smidgen.trunk import Batch, Trunk, no_positions

log = logging.getLogger("smidgen")

T = TypeVar("T")

AT_ONCE = ("cuda",)  # devices on which a layer's tensors are displaced together
_LARGE = 64.0  # hidden states times this show a soft cap that ordinary ones stay below


class Engine(Trunk):
    """Sequential probing of one model.

    `kind` decides how labels meet logits (see `smidgen.loss`). `forwards` counts evaluations. The first batch that an
    engine sees is used for the self-check; a trainer's own loss (`call`) has to be given to `check` before.
    """

    _whole_layers = True  # whether a layer's tensors may be displaced together
    _captures = True  # whether evaluations may become CUDA graphs

    def __init__(self, model: nn.Module, view: ParamView, kind: Kind = "causal"):
        super().__init__(model, kind)
        self.view = view
        self.backwards = 0  # back-propagations so far
        self.jvps = 0  # evaluations in forward mode so far; `forwards` counts each as one too
        self.bad_steps = 0  # steps without a finite loss so far
        self._entries = {id(e.tensor): e for e in view}
        self.scratch = Scratch()
        self.readers = Readers(model, view)
        self._groups: list[Reader] | None = None  # the readers as they are displaced; None: as they are
        self.reuse = Reuse(view)
        self.graphs = Graphs(model, self.scratch) if self._captures and _on(DEVICES, view) else None
        self._checked = False
        self._linear = layers(model)

    def entry_of(self, parameter: Tensor) -> Entry | None:
        """The view's entry of a parameter, or None when it is frozen."""
        return self._entries.get(id(parameter))

    def scratch_bytes(self) -> int:
        """Bytes of scratch held now."""
        return self.scratch.nbytes()

    # -- displacement -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def displaced(self, probe: Probe, *, head: bool = True) -> Iterator[None]:
        """Inside this context a forward of the model sees theta + probe. Theta is never written.

        `head=False` leaves the output head as it is: the caller applies it with `smidgen.loss`.
        """
        if varies([probe]):
            known(None)
        with contextlib.nullcontext() if not probe else self._through(Displaced(probe), head=head):
            yield

    @contextlib.contextmanager
    def _through(self, lens: Lens, *, head: bool) -> Iterator[None]:
        """Inside this context modules see their tuned tensors through a lens."""
        saved: list[tuple[nn.Module, str, Tensor]] = []
        handles, undo = [], []
        try:
            for reader in self.readers if self._groups is None else self._groups:
                if not head and reader.module is self.head:
                    continue
                if not any(lens.touches(e.name) for e, _, _ in reader.tensors):
                    continue
                enter, leave = self._hooks(reader, lens, saved)
                if reader.module is None:
                    enter()
                    continue
                if wrapped(reader.module):
                    undo.append(around(reader.module, enter, leave))
                else:
                    handles.append(reader.module.register_forward_pre_hook(enter))
                    handles.append(reader.module.register_forward_hook(leave))
                if held := {a: e for e, _, a in reader.tensors if e.addend is not None and lens.touches(e.name)}:
                    handles.append(reader.module.register_forward_hook(lens.beside(held)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for back in undo:
                back()
            for owner, attribute, tensor in saved:
                owner._parameters[attribute] = tensor  # type: ignore[assignment]

    def _hooks(
        self, reader: Reader, lens: Lens, saved: list[tuple[nn.Module, str, Tensor]]
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        tensors = [(e, owner, a) for e, owner, a in reader.tensors if e.addend is None and lens.touches(e.name)]
        saved.extend((owner, a, owner._parameters[a]) for _, owner, a in tensors)  # type: ignore[misc]
        originals: list[tuple[nn.Module, str, Any]] = []  # as they are when the module runs: accelerate brings some
        slot = reader.name if reader.nested else "common"
        rows_only = isinstance(reader.module, nn.Embedding) and reader.module.max_norm is None  # max_norm writes

        def enter(*_: Any) -> None:
            originals[:] = [(module, name, module._parameters[name]) for _, module, name in tensors]
            whole, weights = [], []
            for entry, owner, attribute in tensors:
                weight = owner._parameters[attribute].detach()  # type: ignore[union-attr]
                if rows_only and attribute == "weight" and owner is reader.module:
                    table = torch.Tensor._make_subclass(LookedUp, weight)
                    table.lens, table.entry = lens, entry
                    owner._parameters[attribute] = table  # type: ignore[assignment]
                else:
                    whole.append((entry, owner, attribute))
                    weights.append(weight)
            seen = lens.blocks([place[0] for place in whole], weights, self.scratch.of(reader, slot, weights))
            for (_entry, owner, attribute), tensor in zip(whole, seen, strict=True):
                owner._parameters[attribute] = tensor  # type: ignore[assignment]

        def leave(*_: Any) -> None:
            for owner, attribute, tensor in originals:
                owner._parameters[attribute] = tensor

        return enter, leave

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, probe: Probe = (), held: Held | None = None, *, replay: bool = False) -> Losses:
        """Loss of each label of one micro-batch at theta + probe. No gradient, evaluation mode, theta untouched.

        Cost: one forward; memory of a forward without gradient, without the logits of unlabelled positions. With `held`,
        the micro-batch's hidden states at theta, layers below the probe are not run again; see `smidgen.reuse`. replay: whether
        a CUDA graph may do it.
        """
        self._check_once(batch)
        run = functools.partial(self._evaluate, batch, probe, replay)
        if held is None or not self.reuse.every:
            return run()
        self._locate(batch)
        return self.reuse.evaluate(held, probe, run, functools.partial(self._uncounted, run))

    def together(
        self, batch: Batch, probes: Sequence[Probe], held: Held | None = None, span: Span | None = None
    ) -> list[Losses]:
        """`losses` of several probes. Where examples have directions of their own, `span` says which examples of the step
        these are; each is then evaluated alone, together counted as one forward a probe. All are replayed from CUDA graphs, or
        none: what is compared must come from the same kernels."""
        replay = all(map(replayable, probes))
        return [
            self._apart(batch, probe, span) if varies([probe]) else self.losses(batch, probe, held, replay=replay)
            for probe in probes
        ]

    def every(
        self, batches: Sequence[Batch], probes: Sequence[Probe], held: Sequence[Held], spans: Sequence[Span]
    ) -> list[list[Losses]]:
        """`together` for several micro-batches."""
        return [self.together(b, probes, h, s) for b, h, s in zip(batches, held, spans, strict=True)]

    def _apart(self, batch: Batch, probe: Probe, span: Span | None) -> Losses:
        before = self.forwards
        found = one_by_one(self.losses, batch, probe, known(span))
        self.forwards = before + 1
        return found

    def _locate(self, batch: Batch) -> None:
        """Find the stack of layers, unless that was done."""
        if self.reuse.open:
            run = functools.partial(self._evaluate, _few(batch), ())
            self.reuse.locate(self.model, self.readers, lambda: self._uncounted(run))

    def _evaluate(self, batch: Batch, probe: Probe, replay: bool = False) -> Losses:
        head, output = self._seen_head(Displaced(probe)), None
        if replay and self.graphs is not None and not self.own_head:
            inputs = self._inputs(batch)
            output = self.graphs.dense(inputs, probe, self._displaced_output)
            if output is not None:
                self._count(inputs)
        with self._evaluating(), self.displaced(probe if output is None else (), head=self.own_head):
            return self._losses(batch, head, head_nll, output)

    def _displaced_output(self, inputs: Batch, probe: Probe) -> Tensor:
        """What a graph keeps of a forward at theta + probe."""
        with self._evaluating(), self.displaced(probe, head=False):
            return self._uncounted_output(inputs)

    def _uncounted_output(self, inputs: Batch) -> Tensor:
        """The logits of a classifier, or what the output head is given; of a forward that is not counted."""
        if self.kind == "classification":
            return self._run(inputs).logits  # type: ignore[no-any-return]
        output, _ = self._to_head(inputs, no_positions)
        if output is None:
            raise CannotReplayError("the model computes logits without calling its head")
        return output

    def _uncounted(self, run: Callable[[], T]) -> T:
        """An evaluation that checks us, not one that was asked for."""
        counts = self.forwards, self.tokens
        try:
            return run()
        finally:
            self.forwards, self.tokens = counts

    def slope(self, batch: Batch, direction: Direction) -> tuple[Losses, Tensor]:
        """Losses of one micro-batch at theta, and the derivative of each along a direction [n], by forward mode.

        Cost: see `smidgen.forward_mode`; counted as one forward, and in `jvps`. Theta is untouched. Raises ConfigError
        for a model with an operation that has no forward mode.
        """
        self._check_once(batch)
        if not self.jvps and (line := plain_kernels_notice(unwrapped(self.model))) is not None:
            log.warning(line)
        lens = Tangent(direction)
        with self._evaluating(), differentiated(unwrapped(self.model)), self._through(lens, head=self.own_head):
            found = self._losses(batch, self._seen_head(lens), head_nll)
            nll, tangent = slopes(found.nll)
        self.jvps += 1
        return found._replace(nll=nll), tangent

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradient, dropout off, fast linear layers."""
        with torch.no_grad(), evaluation_mode(self.model), fast(self._linear):
            yield

    def choice_scores(self, batch: Batch, probe: Probe = ()) -> Tensor:
        """Logits of the batch's `choices` (or of the classes) for each row, [B, C] float32."""
        self._check_once(batch)
        with self._evaluating(), self.displaced(probe, head=self.own_head):
            if self.kind == "classification":
                return self._forward(batch).logits.float()
            where = targets(batch["labels"], self.kind)
            hidden, logits = self._hidden(batch, where)
            choices = batch["choices"]
            if logits is not None:
                return logits[:, choices].float()
            return choice_logits(hidden, choices, self._seen_head(Displaced(probe)))

    def call(self, loss: Callable[[], Tensor], probe: Probe = ()) -> Tensor:
        """Any loss of the model, called unchanged at theta + probe (a trainer's own `compute_loss`)."""
        self.forwards += 1
        with torch.no_grad(), evaluation_mode(self.model), self.displaced(probe):
            return loss()

    def differentiable(self, batch: Batch) -> Losses:
        """The same losses with an autograd graph, in the model's present mode."""
        self._check_once(batch)
        head = None if not self._applies_head_itself() else PlainHead(self.head.weight, self.head.bias)  # type: ignore[union-attr,arg-type]
        return self._losses(batch, head, head_nll_differentiable)

    def _losses(
        self, batch: Batch, head: Any, nll: Callable[[Tensor, Tensor, Any], Tensor], output: Tensor | None = None
    ) -> Losses:
        """Losses through `head`, a `loss.Head`; it is not used where the model's own logits are. `output`: that of
        `_displaced_output`, where a forward was run."""
        if self.kind == "classification":
            return _class_losses(self._forward(batch).logits if output is None else output, batch)
        where = targets(batch["labels"], self.kind)
        hidden, logits = self._hidden(batch, where, output)
        size = batch["labels"].shape[0]
        choices, tokens = batch.get("choices"), where.tokens
        if logits is None and choices is None:
            return grouped(Losses(nll(hidden, tokens, head), where.rows, size), batch)
        if choices is not None:
            logits = choice_logits(hidden, choices, head) if logits is None else logits[:, choices]
            tokens = choice_index(tokens, choices)
        assert logits is not None
        return grouped(Losses(criterion_loss(logits, tokens, batch), where.rows, size), batch)

    def _seen_head(self, lens: Lens) -> Any:
        return LensedHead(self.head, lens, self.entry_of, self.scratch.like) if self._applies_head_itself() else None  # type: ignore[arg-type]

    # -- self-check ---------------------------------------------------------------------------------------------------

    def check(self, run: Callable[[], Any]) -> None:
        """Find the module that reads each tuned tensor by calling `run`, one evaluation; see `smidgen.readers`."""
        counts, before = (self.forwards, self.tokens), attached(self.model.modules())
        with torch.no_grad(), evaluation_mode(self.model):
            self.readers.locate(run)
            if self._whole_layers and _on(AT_ONCE, self.view):
                layers = [layer for stack in stacks(self.model) for layer in stack]
                self._groups = of_layers(self.readers, layers, run)
        self.forwards, self.tokens = counts
        if self.graphs is not None:
            self.graphs.known |= attached(self.model.modules()) - before  # which transformers attaches at its first forward

    def prepare(self, batch: Batch) -> None:
        """The self-check on a batch as for `losses`, unless one was made: what `call` needs before its first probe."""
        self._check_once(batch)

    def _check_once(self, batch: Batch) -> None:
        if not self._checked:
            self.check_batch(batch)

    def check_batch(self, batch: Batch) -> None:
        """`check` with this engine's own loss, and a test that the head's output is what the model makes of it.

        A model that post-processes its logits (soft capping, scaling) keeps its own head, applied to the label
        positions only; one line says so.
        """
        self._checked = True
        few, counts = _few(batch), (self.forwards, self.tokens)
        if self.kind == "classification":
            self.check(lambda: self._forward(few))
            return
        where = targets(few["labels"], self.kind)
        self.check(lambda: self._hidden(few, where))
        if self._applies_head_itself():
            with torch.no_grad(), evaluation_mode(self.model):
                hidden, unused = self._hidden(few, where)
                if unused is None:
                    ours = F.linear(hidden * _LARGE, self.head.weight, self.head.bias)  # type: ignore[union-attr,arg-type]
                    self.own_head = True
                    _, theirs = self._hidden(few, where, factor=_LARGE)
                    self.own_head = theirs is None or not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)
            if self.own_head:
                log.warning("the model changes the logits after its head: the head is run whole, on label positions only")
            self.forwards, self.tokens = counts


def _class_losses(logits: Tensor, batch: Batch) -> Losses:
    labels = batch["labels"]
    rows = torch.arange(labels.shape[0], device=labels.device)
    return Losses(criterion_loss(logits, labels.view(-1), batch), rows, labels.shape[0])


def _on(devices: Sequence[str], view: ParamView) -> bool:
    """Whether a tuned tensor lies on a device of one of these types."""
    return any(e.tensor.device.type in devices for e in view)


def _few(batch: Batch) -> Batch:
    """The first two rows with at most four labels: enough for a self-check."""
    kept = {k: v for k, v in batch.items() if k not in NOT_INPUTS or k in ("labels", "choices")}
    few = {k: v if k == "choices" or not isinstance(v, Tensor) else v[:2] for k, v in kept.items()}
    if few["labels"].ndim == 2:
        labelled = few["labels"] != IGNORE
        later = labelled.flatten().cumsum(0).view_as(labelled) > 4
        few["labels"] = few["labels"].masked_fill(later, IGNORE)
    return few
