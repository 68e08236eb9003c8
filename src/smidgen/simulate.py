"""A model's step on tensors without storage: how many bytes would be alive, without a byte of weights being read.

The model is built from its configuration under torch's FakeTensorMode, and its forward or back-propagation runs as it would
on the device, operation by operation, while a `Ledger` adds up the storages that are alive. What holds for every
architecture that transformers can build: attention kernels, saved tensors, recomputation and masks are the real ones.

Deep models are simulated with few layers and extrapolated: weights, the forward's peak, and the two ends of the backward
pass, where its peak lies, are each affine in the number of layers (of a period of two, as alternating attention has).

Does not see: workspace inside an operation, the allocator's fragmentation, tensors whose size depends on data.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smidgen.kinds import Kind
from smidgen.loss import PlainHead, head_nll, head_nll_differentiable, logits_nll
from smidgen.readers import output_head

_BLOCKS = 3  # of logits that are simulated: each takes what the one before has left


def mode() -> Any:
    """A context in which tensors have shapes, dtypes and devices, and no memory. One model belongs to one of them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def strip(model: nn.Module, device: str) -> None:
    """Put tensors without storage on `device` into a model from `build`; inside a `mode`.

    Where torch has no CUDA, the kernels of a CPU stand for those of a CUDA device: autograd would abort the process.
    """
    device = device if torch.cuda.is_available() else "cpu"
    made: dict[int, Tensor] = {}

    def of(t: Tensor) -> Tensor:
        if id(t) not in made:
            there = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            made[id(t)] = nn.Parameter(there, t.requires_grad) if isinstance(t, nn.Parameter) else there
        return made[id(t)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: of(t) for name, t in tensors.items() if t is not None})  # type: ignore[arg-type,misc]


@contextlib.contextmanager
def without_storage(model: nn.Module, device: str) -> Iterator[None]:
    """Inside, tensors have no memory; those of a model from `build` are on `device`."""
    with mode():
        strip(model, device)
        yield


@contextlib.contextmanager
def keeping(model: nn.Module, keep: str) -> Iterator[None]:
    """Inside, the backward pass keeps all activations, or with `checkpointing` the inputs of layers."""
    if keep != "checkpointing":
        yield
        return
    checkpoint(model)
    try:
        yield
    finally:
        with _older_name():
            model.gradient_checkpointing_disable()  # type: ignore[operator]


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; `held` are not counted."""

    def __init__(self, held: Iterator[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in held:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size

    def mark(self) -> int:
        """The peak since the last mark; the next span begins with what is alive."""
        peak, self.peak = self.peak, self.live
        return peak


@dataclass(frozen=True)
class Trace:
    """Bytes of one model at one batch."""

    weights: int
    trunk: int = 0  # peak of a forward without gradient over the weights
    body: int = 0  # of it, before the output head
    start: int = 0  # peak of a forward and a backward up to the last layer: every layer's saved tensors, the logits
    between: int = 0  # peak between the last layer and the first; simulated models of few layers only
    end: int = 0  # peak of the backward from the first layer on: every gradient
    saved: int = 0  # of `start`: what the forward keeps for the backward

    def extrapolated(self, other: Trace, layers: tuple[int, int], wanted: int) -> Trace:
        """The affine function through two traces of different depths, at another depth."""

        def at(name: str) -> int:
            first, second = getattr(self, name), getattr(other, name)
            return max(0, round(first + (second - first) / (layers[1] - layers[0]) * (wanted - layers[0])))

        return Trace(**{field.name: at(field.name) for field in fields(self)})

    @property
    def backward(self) -> int:
        """Peak of a forward and a backward over the weights."""
        return max(self.start, self.between, self.end)


@contextlib.contextmanager
def _older_name() -> Iterator[None]:
    """Older versions of transformers 5 know no other name for activation checkpointing, and newer ones warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_.*` is deprecated", FutureWarning)
        yield


def checkpoint(model: nn.Module) -> None:
    """Let the backward pass of a model recompute its layers, as a run does that asks Trainer for it."""
    with _older_name():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


_STORED = {"nf4": 0.516, "int8": 1.0}  # bytes a weight: codes, and their scales (bitsandbytes, doubly quantised)


class _Dequantised(torch.autograd.Function):
    """x W^T with a copy of W that lives as long as the product, in the backward pass again: `smidgen.quantised`'s cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ weight.clone().t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.weight.clone(), None


def quantised(model: nn.Module) -> None:
    """Let the linear layers of a model without storage, but its output head, cost what quantised ones do."""
    head = output_head(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and module.weight.shape[0] > 1:
            module.weight.requires_grad_(False)

            def forward(x: Tensor, of: nn.Linear = module) -> Tensor:
                y = _Dequantised.apply(x, of.weight.detach())
                return y if of.bias is None else y + of.bias

            module.forward = forward  # type: ignore[method-assign,assignment]
            module.smidgen_quantised = True  # type: ignore[assignment]


def saved_by(model: nn.Module, quantise: str | None) -> int:
    """Bytes by which quantised layers are smaller than what stands for them in a simulated model."""
    if quantise is None:
        return 0
    held = [m.weight for m in model.modules() if getattr(m, "smidgen_quantised", False)]
    return sum(int(w.numel() * (w.element_size() - _STORED[quantise])) for w in held)  # type: ignore[operator,union-attr,misc]


@dataclass(frozen=True)
class Rows:
    """The batch of a step."""

    rows: int
    length: int
    labels: int | None = None  # labelled positions of a row; None: all


def build(
    config: Any, kind: Kind, dtype: torch.dtype, classes: int | None = None, device: str | torch.device = "meta"
) -> nn.Module:
    """A model made of its configuration, in evaluation mode; on the meta device it has no storage, elsewhere random weights."""
    import transformers

    from smidgen.kinds import head_of

    found = copy.deepcopy(config)
    if kind == "classification" and classes:
        found.num_labels = classes
    if kind == "classification" and found.pad_token_id is None:
        found.pad_token_id = 0
    auto = head_of(config.name_or_path or config.model_type, config, kind)
    assert issubclass(auto, transformers.models.auto.auto_factory._BaseAutoModelClass)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return auto.from_config(found, dtype=dtype).eval()  # type: ignore[no-any-return]


def trace(
    model: nn.Module, kind: Kind, batch: Rows, *, backward: bool, dropout: bool = True, quantise: str | None = None
) -> Trace:
    """Simulate one forward, or one forward and backward, of a model without storage; inside `without_storage`.

    quantise: how the layers that `quantised` marked are held.
    The loss is that of `smidgen.loss`: only labelled positions meet the output head, in blocks.
    """
    held = [*model.parameters(), *model.buffers()]
    weights = sum(t.untyped_storage().nbytes() for t in {id(t.untyped_storage()): t for t in held}.values())
    weights -= saved_by(model, quantise)
    ledger, layers = Ledger(iter(held)), _layers(model)
    if not backward:
        with torch.no_grad(), ledger:
            hidden = _trunk(model, kind, batch)
            body = ledger.mark()
            _loss(model, kind, hidden)
        return Trace(weights, trunk=max(body, ledger.mark()), body=body)
    model.train(dropout)
    spans: dict[str, int] = {}
    with torch.enable_grad(), ledger, _watched(layers, ledger, spans):
        loss = _loss(model, kind, _trunk(model, kind, batch))
        saved = ledger.live
        loss.backward()
        last = ledger.mark()
    model.eval()
    model.zero_grad(set_to_none=True)
    if "start" not in spans:
        return Trace(weights, start=last, saved=saved)
    return Trace(weights, start=spans["start"], between=spans.get("between", 0), end=last, saved=saved)


@contextlib.contextmanager
def _watched(layers: list[nn.Module], ledger: Ledger, spans: dict[str, int]) -> Iterator[None]:
    """Note the ledger's peak when the gradients of the last layer's and of the second layer's input are there."""
    seen: set[int] = set()

    def tap(index: int, span: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            if index not in seen and isinstance(x, Tensor) and x.requires_grad:
                seen.add(index)
                x.register_hook(lambda _: spans.__setitem__(span, ledger.mark()))

        return enter

    handles = []
    if len(layers) > 2:
        for index, span in ((len(layers) - 1, "start"), (1, "between")):
            handles.append(layers[index].register_forward_pre_hook(tap(index, span), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers: its longest list of modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _trunk(model: nn.Module, kind: Kind, batch: Rows) -> Tensor:
    """Hidden states [n, H] at labelled positions, or the logits of a classifier [B, C]."""
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long, device=next(model.parameters()).device)
    inputs: dict[str, Tensor | bool] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "classification":
        return model(**inputs).logits
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = ids
    head = output_head(model)
    caught: list[Tensor] = []

    def tap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count = batch.rows * (batch.labels or batch.length)
        caught.append(args[0].flatten(0, 1).index_select(0, torch.arange(count, device=ids.device)))
        return (args[0][:, :0], *args[1:])

    if head is None:
        raise LookupError(f"{type(model).__name__} has no output head")
    handle = head.register_forward_pre_hook(tap)
    try:
        if kind != "masked":
            inputs["use_cache"] = False
        model(**inputs)
    finally:
        handle.remove()
    return caught[0]


def _loss(model: nn.Module, kind: Kind, hidden: Tensor) -> Tensor:
    labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    if kind == "classification":
        return logits_nll(hidden, labels).sum()
    head: Any = output_head(model)
    nll = head_nll_differentiable if torch.is_grad_enabled() else head_nll
    return nll(hidden, labels, PlainHead(head.weight, head.bias), _BLOCKS).sum()  # type: ignore[operator]
