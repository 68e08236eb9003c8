"""Sparse deltas on a frozen matrix: theta_i = w_i + delta_i at k positions i, swapped into the matrix itself.

The positions (sorted) and the base's values there are kept beside it, so the forward is one plain product without a copy
of the weight, and taking the deltas out again gives the base bit for bit. deltas are float32 masters; the weight holds
round(w + delta), one rounding, so that changes below half an ulp of a 16-bit weight wait in the master until they show.
The weight is written when a forward finds that deltas have changed since the last one, never between a forward and its
backward (autograd would raise). Where a module is shown other deltas (a probe, a tangent), it computes with a displaced
copy of its weight instead, and the weight stays. Changes are seen by the versions of the parameter and of its entry in the
view; what is written through `.data` shows neither.

A quantised matrix (`smidgen.quantised`) is never written: its values are made for each product, in the dtype of its input,
and the deltas are added to these, with one rounding.

Bytes an entry: delta 4, position 2 (4 where the matrix has more than 65,536 columns) and 4 a row, the base's value (none of
a quantised one). It does not: adapt tied weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smidgen import quantised
from smidgen.adapt._growth import Phase
from smidgen.adapt._sparse_gradient import products
from smidgen.linear import linear
from smidgen.params import Entry, Support

DELTA = "delta"  # the parameter's name in its module


class Settled(NamedTuple):
    """Entries that were tuned and stand still now."""

    index: Tensor  # type: ignore[assignment]  # flat positions, sorted
    base: Tensor  # what the base has there
    delta: Tensor


class Site:
    """One matrix with deltas: where they are, what the base has there, and a phase of collecting gradients, if any."""

    def __init__(self, module: Any, index: Tensor):
        self.module, self.weight = module, module.weight
        self.quantised = quantised.kind(module) is not None
        shape = quantised.shape(module) if self.quantised else (self.weight.shape[0], self.weight.shape[1])
        self.support = Support(shape, index.to(self.weight.device))
        self.base: Tensor | None = None if self.quantised else self.read()
        self.delta = nn.Parameter(torch.zeros(index.numel(), dtype=torch.float32, device=self.weight.device))
        self.settled: Settled | None = None
        self.entry: Entry | None = None  # of the view that lists the delta
        self.phase: Phase | None = None
        self.owed: Callable[[], Tensor] | None = None  # a gradient that the deltas get once more, in the next backward pass
        self._written: tuple[int, int] | None = None  # versions of the deltas that the weight holds

    @property
    def index(self) -> Tensor:
        """Flat positions of the deltas, made anew."""
        return self.support.index

    def read(self) -> Tensor:
        """The weight at the positions."""
        return self.weight.detach().view(-1)[self.index]

    def everything(self) -> tuple[Tensor, Tensor]:
        """(positions, deltas) of all entries, those that have settled too, sorted."""
        index, delta = self.index, self.delta.detach()
        if self.settled is None:
            return index, delta
        both, order = torch.cat([index, self.settled.index]).sort()
        return both, torch.cat([delta, self.settled.delta])[order]

    # -- the weight ---------------------------------------------------------------------------------------------------

    def swap_in(self) -> None:
        """Bring the weight up to date with the deltas; O(k) where they have changed, else nothing."""
        versions = (0 if self.entry is None else self.entry.version, self.delta._version)
        if versions != self._written and self.base is not None:
            flat = self.weight.detach().view(-1)
            flat[self.index] = sums(self.base, self.delta.detach())
            if self.settled is not None:
                flat[self.settled.index] = sums(self.settled.base, self.settled.delta)
            self._written = versions

    def swap_out(self) -> None:
        """The base's own bits; the next forward puts the deltas back."""
        if self.base is not None:
            flat = self.weight.detach().view(-1)
            flat[self.index] = self.base
            if self.settled is not None:
                flat[self.settled.index] = self.settled.base
        self._written = None

    def move(self, index: Tensor) -> None:
        """Other positions, as many; the caller sets the deltas."""
        assert index.numel() == len(self.support) and bool((index[1:] > index[:-1]).all())
        self.swap_out()
        self.support.move(index)
        self.base = None if self.quantised else self.read()

    def settle(self, stays: Tensor) -> None:
        """Of the deltas only those in the mask `stays` [k] are tuned further; the others keep the value that they have."""
        index, delta, left = self.index, self.delta.detach().clone(), ~stays
        base = torch.zeros_like(delta) if self.base is None else self.base
        parts = [(index[left], base[left], delta[left]), *([] if self.settled is None else [self.settled])]
        gone, held, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = gone.argsort()
        self.settled = Settled(gone[order], held[order], values[order]) if len(order) else None
        self._resize(index[stays], delta[stays])
        self.base = None if self.base is None else base[stays]

    def restore(self, index: Tensor, delta: Tensor) -> None:
        """All entries as `everything` gave them, tuned again."""
        self.swap_out()
        self.settled = None
        self._resize(index, delta)
        self.base = None if self.quantised else self.read()

    def _resize(self, index: Tensor, delta: Tensor) -> None:
        self.support.move(index)
        if len(delta) != len(self.delta):
            self.delta.requires_grad_(False).resize_(len(delta)).requires_grad_(True)
        self.delta.detach().copy_(delta)
        self._written = None
        if self.entry is not None:
            self.entry.version += 1

    def displaced(self, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the weight (of a quantised one: its values in `dtype`) with these deltas; carries their tangent along."""
        made = self.quantised
        copy = quantised.dequantise(self.module, dtype=dtype) if made else self.weight.detach().clone()
        flat, base, index = copy.view(-1), self.base, self.index.long()
        if self.settled is not None:
            held = flat[self.settled.index] if base is None else self.settled.base
            flat[self.settled.index] = sums(held, self.settled.delta)
        if base is None:
            base = flat[index]
        value = (base.float() + delta).to(base.dtype)  # also where delta is zero: its tangent is not
        return flat.index_put_((index,), value).view(self.support.shape)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Gradient of the deltas from the factors of the weight's [T, o], [T, i]; shows them to an open phase."""
        see = products if self.phase is None else self.phase.see
        found = see(left, right, self.index)
        if self.owed is not None:
            found, self.owed = found + self.owed(), None
        return found


def sums(base: Tensor, delta: Tensor) -> Tensor:
    """round(w + delta); w itself, also the sign of a zero, where delta is zero."""
    return torch.where(delta == 0, base, (base.float() + delta).to(base.dtype))


class _Product(torch.autograd.Function):
    """y = x W^T + b (x W + b where transposed) with a gradient for the deltas in W. Keeps x alone; W is a reference, or made
    again where the base is quantised (`weight` None)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, weight: Tensor | None, bias: Tensor | None, site: Site, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, delta if weight is None else weight)
        ctx.site, ctx.transposed, ctx.made = site, transposed, weight is None
        return _product(x, site.displaced(delta, x.dtype) if weight is None else weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = gradients[0]
        dx = delta = bias = None
        if ctx.needs_input_grad[0]:
            if ctx.made:
                weight = ctx.site.displaced(weight, x.dtype)
            dy = g.to(weight.dtype)  # under autocast the output is narrower than the weight
            dx = linear(dy, weight if ctx.transposed else weight.t(), None).to(x.dtype)
        flat_x, flat_g = x.reshape(-1, x.shape[-1]).to(g.dtype), g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[1]:
            delta = ctx.site.gradient(*((flat_x, flat_g) if ctx.transposed else (flat_g, flat_x)))
        if ctx.needs_input_grad[3]:
            bias = flat_g.sum(0)
        return dx, delta, None, bias, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return linear(x, weight.t() if transposed else weight, bias)


def _forward(module: Any, x: Tensor, transposed: bool = False) -> Tensor:
    delta, site, bias = module._parameters[DELTA], module.site, module.bias
    if site.quantised and bias is not None:
        bias = bias.to(x.dtype)
    if delta is not site.delta or (site.quantised and not torch.is_grad_enabled()):
        return _product(x, site.displaced(delta, x.dtype), bias, transposed)
    site.swap_in()
    if not torch.is_grad_enabled():
        return _product(x, module.weight, bias, transposed)
    return _Product.apply(x, delta, None if site.quantised else module.weight, bias, site, transposed)


class SparseLinear(nn.Linear):
    """A linear layer with deltas in its weight. A plain layer becomes one by its class, so its names stay."""

    site: Site

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)


class SparseConv1D(Conv1D):
    """The same of transformers' Conv1D, whose weight is [in, out]."""

    site: Site

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, True)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def install(module: nn.Module, index: Tensor) -> Site:
    """Give a layer of one of `KINDS`, or a quantised linear one, deltas at flat positions of its weight."""
    module.site = site = Site(module, index)  # type: ignore[assignment]
    module.register_parameter(DELTA, site.delta)
    if site.quantised:  # the library's class stays, which knows how to save it
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign,assignment]
    else:
        module.__class__ = KINDS[type(module)]
    return site


def strip(model: nn.Module) -> nn.Module:
    """Make the layers of an unquantised model plain again; their weights stay as they are."""
    plain = {sparse: kind for kind, sparse in KINDS.items()}
    for module in model.modules():
        if type(module) in plain:
            del module.site, module._parameters[DELTA]
            module.__class__ = plain[type(module)]
    return model


@contextlib.contextmanager
def bare(sites: Sequence[Site]) -> Iterator[None]:
    """Inside this context the weights are the base's, bit for bit."""
    for site in sites:
        site.swap_out()
    try:
        yield
    finally:
        for site in sites:
            site.swap_in()
