"""Evaluate a model at theta + probe while theta stays untouched, bit for bit.

The sequential engine: one probe at a time. Every tuned tensor is replaced, for the duration of the innermost module
forward that reads it, by a displaced copy in scratch memory. Three kinds of reader:

- an embedding displaces only the rows it looks up;
- the output head is applied by `smidgen.loss`, in displaced blocks of the vocabulary, at label positions only;
- any other module gets its tensors displaced in a scratch buffer that all such modules share.

Which module reads a tensor is found by a self-check, see `smidgen.readers`.

Cost of an evaluation: one forward and one pass of the noise generator over the tensors that it reads. Scratch: the
largest group of tensors that one module reads, at most the largest tuned tensor for ordinary models.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.directions import Probe, displace, displace_rows, restrict
from smidgen.kinds import Kind
from smidgen.linear import fast, layers
from smidgen.lookup import LookedUp
from smidgen.loss import (
    IGNORE,
    Losses,
    PlainHead,
    Targets,
    choice_index,
    choice_logits,
    head_nll,
    head_nll_differentiable,
    logits_nll,
    targets,
)
from smidgen.params import Entry, ParamView
from smidgen.readers import ALIGN, Reader, Readers, aligned

log = logging.getLogger("smidgen")

Batch = dict[str, Any]

_LARGE = 64.0  # hidden states times this show a soft cap that ordinary ones stay below


class _ProbedHead:
    """The output head at theta + probe; a tuned weight is displaced block by block in scratch."""

    def __init__(self, engine: Engine, module: nn.Linear, probe: Probe):
        self._engine, self._probe = engine, probe
        self._weight, self._bias = module.weight, module.bias
        self.rows, self.width = module.weight.shape

    def _displaced(self, parameter: Tensor | None, first: int, stop: int, slot: str) -> Tensor | None:
        if parameter is None:
            return None
        block = parameter.detach()[first:stop]
        entry = self._engine.entry_of(parameter)
        if entry is None or not restrict(self._probe, entry.name):
            return block
        out = self._engine.scratch(slot, block)
        displace(self._probe, entry.name, block.contiguous(), out, first=first)
        return out

    def block(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        weight = self._displaced(self._weight, first, stop, "head")
        assert weight is not None
        return weight, self._displaced(self._bias, first, stop, "head bias")

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = []
        for parameter in (self._weight, self._bias):
            if parameter is None:
                rows.append(None)
                continue
            entry, table = self._engine.entry_of(parameter), parameter.detach()
            picked = table[ids]
            if entry is not None and restrict(self._probe, entry.name):
                matrix = table.view(table.shape[0], -1)
                displace_rows(self._probe, entry.name, matrix, ids, picked.view(ids.shape[0], -1))
            rows.append(picked)
        return rows[0], rows[1]  # type: ignore[return-value]


class Engine:
    """Sequential probing of one model.

    `kind` decides how labels meet logits (see `smidgen.loss`). `forwards` counts evaluations. The first batch that an
    engine sees is used for the self-check; a trainer's own loss (`call`) has to be given to `check` before.
    """

    def __init__(self, model: nn.Module, view: ParamView, kind: Kind = "causal"):
        self.model, self.view, self.kind = model, view, kind
        self.forwards = 0  # model evaluations so far
        self.tokens = 0  # input tokens of those evaluations
        self.backwards = 0  # back-propagations so far
        self.bad_steps = 0  # steps without a finite loss so far
        self._entries = {id(e.tensor): e for e in view}
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._accepted = set(inspect.signature(_unwrapped(model).forward).parameters)
        self._head = _output_head(model) if kind != "classification" else None
        self._own_head = self._head is not None and not isinstance(self._head, nn.Linear)
        self.readers = Readers(model, view)
        self._checked = False
        self._linear = layers(model)

    def entry_of(self, parameter: Tensor) -> Entry | None:
        """The view's entry of a parameter, or None when it is frozen."""
        return self._entries.get(id(parameter))

    def scratch(self, slot: str, like: Tensor, offset: int = 0, total: int = 0) -> Tensor:
        """A contiguous tensor shaped as `like` in the buffer `slot`, `offset` bytes in."""
        size = like.numel() * like.element_size()
        need = max(total, offset + size)
        key = (slot, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < need:
            self._buffers.pop(key, None)
            buffer = self._buffers[key] = torch.empty(need + ALIGN, dtype=torch.uint8, device=like.device)
        shift = -buffer.data_ptr() % ALIGN + offset
        if shift + size > buffer.numel():  # alignment took the spare bytes
            shift = offset
        return buffer[shift : shift + size].view(like.dtype).view(like.shape)

    def scratch_bytes(self) -> int:
        """Bytes of scratch held now."""
        return sum(b.numel() for b in self._buffers.values())

    # -- displacement -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def displaced(self, probe: Probe, *, head: bool = True) -> Iterator[None]:
        """Inside this context a forward of the model sees theta + probe. Theta is never written.

        `head=False` leaves the output head as it is: the caller applies it with `smidgen.loss`.
        """
        if not probe:
            yield
            return
        saved: list[tuple[nn.Module, str, Tensor]] = []
        handles = []
        try:
            for reader in self.readers:
                if not head and reader.module is self._head:
                    continue
                enter, leave = self._hooks(reader, probe, saved)
                if reader.module is None:
                    enter()
                else:
                    handles.append(reader.module.register_forward_pre_hook(enter))
                    handles.append(reader.module.register_forward_hook(leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner, attribute, tensor in saved:
                owner._parameters[attribute] = tensor  # type: ignore[assignment]

    def _hooks(
        self, reader: Reader, probe: Probe, saved: list[tuple[nn.Module, str, Tensor]]
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        tensors = [(e, owner, a) for e, owner, a in reader.tensors if restrict(probe, e.name)]
        originals = [(owner, a, owner._parameters[a]) for _, owner, a in tensors]
        saved.extend(originals)  # type: ignore[arg-type]
        slot = reader.name if reader.nested else "common"
        total = reader.nbytes()
        rows_only = isinstance(reader.module, nn.Embedding) and reader.module.max_norm is None  # max_norm writes

        def enter(*_: Any) -> None:
            offset = 0
            for entry, owner, attribute in tensors:
                weight = entry.storage
                if rows_only and attribute == "weight" and owner is reader.module:
                    table = torch.Tensor._make_subclass(LookedUp, weight)
                    table.probe, table.entry = probe, entry
                    owner._parameters[attribute] = table  # type: ignore[assignment]
                    continue
                out = self.scratch(slot, weight, offset, total)
                displace(probe, entry.name, weight.contiguous(), out)
                owner._parameters[attribute] = out  # type: ignore[assignment]
                offset += aligned(weight.numel() * weight.element_size())

        def leave(*_: Any) -> None:
            for owner, attribute, tensor in originals:
                owner._parameters[attribute] = tensor

        return enter, leave

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, probe: Probe = ()) -> Losses:
        """Loss of each label of one micro-batch at theta + probe. No gradient, evaluation mode, theta untouched.

        Cost: one forward; memory of a forward without gradient, without the logits of unlabelled positions.
        """
        self._check_once(batch)
        with self._evaluating(), self.displaced(probe, head=self._own_head):
            return self._losses(batch, self._probed_head(probe), head_nll)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradient, dropout off, fast linear layers."""
        with torch.no_grad(), _evaluation_mode(self.model), fast(self._linear):
            yield

    def choice_scores(self, batch: Batch, probe: Probe = ()) -> Tensor:
        """Logits of the batch's `choices` (or of the classes) for each row, [B, C] float32."""
        self._check_once(batch)
        with self._evaluating(), self.displaced(probe, head=self._own_head):
            if self.kind == "classification":
                return self._forward(batch).logits.float()
            where = targets(batch["labels"], self.kind)
            hidden, logits = self._hidden(batch, where)
            choices = batch["choices"]
            if logits is not None:
                return logits[:, choices].float()
            return choice_logits(hidden, choices, self._probed_head(probe))

    def call(self, loss: Callable[[], Tensor], probe: Probe = ()) -> Tensor:
        """Any loss of the model, called unchanged at theta + probe (a trainer's own `compute_loss`)."""
        self.forwards += 1
        with torch.no_grad(), _evaluation_mode(self.model), self.displaced(probe):
            return loss()

    def differentiable(self, batch: Batch) -> Losses:
        """The same losses with an autograd graph, in the model's present mode."""
        self._check_once(batch)
        head = None if not self._applies_head_itself() else PlainHead(self._head.weight, self._head.bias)  # type: ignore[union-attr,arg-type]
        return self._losses(batch, head, head_nll_differentiable)

    def _losses(self, batch: Batch, head: Any, nll: Callable[[Tensor, Tensor, Any], Tensor]) -> Losses:
        """Losses through `head`, a `loss.Head`; it is not used where the model's own logits are."""
        if self.kind == "classification":
            return _class_losses(self._forward(batch).logits, batch["labels"])
        where = targets(batch["labels"], self.kind)
        hidden, logits = self._hidden(batch, where)
        size = batch["labels"].shape[0]
        choices, tokens = batch.get("choices"), where.tokens
        if logits is None and choices is None:
            return Losses(nll(hidden, tokens, head), where.rows, size)
        if choices is not None:
            logits = choice_logits(hidden, choices, head) if logits is None else logits[:, choices]
            tokens = choice_index(tokens, choices)
        assert logits is not None
        return Losses(logits_nll(logits, tokens), where.rows, size)

    def _probed_head(self, probe: Probe) -> Any:
        return _ProbedHead(self, self._head, probe) if self._applies_head_itself() else None  # type: ignore[arg-type]

    def _applies_head_itself(self) -> bool:
        return self._head is not None and not self._own_head

    def _hidden(self, batch: Batch, where: Targets, *, factor: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Run the trunk; (hidden states at label positions [n, H], None), or (-, the model's own logits [n, V])."""
        caught: list[Tensor] = []
        handle = None
        if self._head is not None:

            def tap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                picked = args[0][where.keep]
                caught.append(picked)
                return (picked[None] * factor if self._own_head else args[0][:, :0], *args[1:])

            handle = self._head.register_forward_pre_hook(tap)
        try:
            logits = self._forward(batch).logits
        finally:
            if handle is not None:
                handle.remove()
        if not caught:  # the model computes logits without calling its head
            return logits, logits[where.keep]
        return (caught[0], logits[0]) if self._own_head else (caught[0], None)

    def _forward(self, batch: Batch) -> Any:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "choices")}
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        if self.kind == "seq2seq" and "decoder_input_ids" not in inputs:
            labels = batch["labels"]
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
        self.forwards += 1
        self.tokens += inputs["input_ids"].numel() if "input_ids" in inputs else 0
        return self.model(**inputs)

    # -- self-check ---------------------------------------------------------------------------------------------------

    def check(self, run: Callable[[], Any]) -> None:
        """Find the module that reads each tuned tensor by calling `run`, one evaluation; see `smidgen.readers`."""
        counts = self.forwards, self.tokens
        with torch.no_grad(), _evaluation_mode(self.model):
            self.readers.locate(run)
        self.forwards, self.tokens = counts

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
            with torch.no_grad(), _evaluation_mode(self.model):
                hidden, unused = self._hidden(few, where)
                if unused is None:
                    ours = F.linear(hidden * _LARGE, self._head.weight, self._head.bias)  # type: ignore[union-attr,arg-type]
                    self._own_head = True
                    _, theirs = self._hidden(few, where, factor=_LARGE)
                    self._own_head = theirs is None or not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)
            if self._own_head:
                log.warning("the model changes the logits after its head: the head is run whole, on label positions only")
            self.forwards, self.tokens = counts


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; the modes of all modules are put back."""
    if not model.training:
        yield
        return
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _class_losses(logits: Tensor, labels: Tensor) -> Losses:
    rows = torch.arange(labels.shape[0], device=labels.device)
    return Losses(logits_nll(logits, labels.view(-1)), rows, labels.shape[0])


def _few(batch: Batch) -> Batch:
    """The first two rows with at most four labels: enough for a self-check."""
    few = {k: v if k == "choices" or not isinstance(v, Tensor) else v[:2] for k, v in batch.items()}
    if few["labels"].ndim == 2:
        labelled = few["labels"] != IGNORE
        later = labelled.flatten().cumsum(0).view_as(labelled) > 4
        few["labels"] = few["labels"].masked_fill(later, IGNORE)
    return few


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model under PEFT's and accelerate's wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(_unwrapped(model), "get_output_embeddings", None)
    return getter() if getter is not None else None
