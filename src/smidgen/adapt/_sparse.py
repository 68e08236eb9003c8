"""Sparse deltas on a frozen matrix: theta_i = w_i + delta_i at k positions i, swapped into the matrix itself.

The positions (sorted) and the base's values there are kept beside it, so the forward is one plain product without a copy
of the weight, and taking the deltas out again gives the base bit for bit. deltas are float32 masters; the weight holds
round(w + delta), one rounding, so that changes below half an ulp of a 16-bit weight wait in the master until they show.
The weight is written when a forward finds that deltas have changed since the last one, never between a forward and its
backward (autograd would raise). Where a module is shown other deltas (a probe, a tangent), it computes with a displaced
copy of its weight instead, and the weight stays. Changes are seen by the versions of the parameter and of its entry in the
view; what is written through `.data` shows neither.

Bytes an entry: delta 4, position 4 (8 where the matrix has 2^31 entries or more), the base's value.
It does not: adapt tied weights, or quantised ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from smidgen.adapt._growth import Phase
from smidgen.adapt._sparse_gradient import products
from smidgen.linear import linear
from smidgen.params import Entry, Support

DELTA = "delta"  # the parameter's name in its module


class Site:
    """One matrix with deltas: where they are, what the base has there, and a phase of collecting gradients, if any."""

    def __init__(self, weight: nn.Parameter, index: Tensor):
        self.weight = weight
        kind = torch.int32 if weight.numel() < 2**31 else torch.int64
        self.support = Support((weight.shape[0], weight.shape[1]), index.to(weight.device, kind))
        self.base = self.read()
        self.delta = nn.Parameter(torch.zeros(index.numel(), dtype=torch.float32, device=weight.device))
        self.entry: Entry | None = None  # of the view that lists the delta
        self.phase: Phase | None = None
        self._written: tuple[int, int] | None = None  # versions of the deltas that the weight holds

    @property
    def index(self) -> Tensor:
        return self.support.index

    def read(self) -> Tensor:
        """The weight at the positions."""
        return self.weight.detach().view(-1)[self.index]

    def sums(self, delta: Tensor) -> Tensor:
        """round(w + delta); w itself, also the sign of a zero, where delta is zero."""
        return torch.where(delta == 0, self.base, (self.base.float() + delta).to(self.base.dtype))

    def swap_in(self) -> None:
        """Bring the weight up to date with the deltas; O(k) where they have changed, else nothing."""
        versions = (0 if self.entry is None else self.entry.version, self.delta._version)
        if versions != self._written:
            self.weight.detach().view(-1)[self.index] = self.sums(self.delta.detach())
            self._written = versions

    def swap_out(self) -> None:
        """The base's own bits; the next forward puts the deltas back."""
        self.weight.detach().view(-1)[self.index] = self.base
        self._written = None

    def move(self, index: Tensor) -> None:
        """Other positions, as many; the caller sets the deltas."""
        assert index.numel() == self.index.numel() and bool((index[1:] > index[:-1]).all())
        self.swap_out()
        self.support.index = index.to(self.index.dtype)
        self.base = self.read()

    def displaced(self, delta: Tensor) -> Tensor:
        """A copy of the weight with other deltas; carries their tangent along."""
        with torch.no_grad():
            base = self.weight.detach().view(-1).index_copy(0, self.index.long(), self.base)
        return base.scatter(0, self.index.long(), (self.base.float() + delta).to(base.dtype)).view_as(self.weight)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Gradient of the deltas from the factors of the weight's [T, o], [T, i]; shows them to an open phase."""
        if self.phase is None:
            return products(left, right, self.index)
        return self.phase.see(left, right, self.index)


class _Product(torch.autograd.Function):
    """y = x W^T + b (x W + b where transposed) with a gradient for the deltas in W. Keeps x alone; W is a reference."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, site: Site, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.site, ctx.transposed = site, transposed
        return _product(x, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = gradients[0]
        dx = delta = bias = None
        if ctx.needs_input_grad[0]:
            dy = g.to(weight.dtype)  # under autocast the output is narrower than the weight
            dx = (dy @ (weight.t() if ctx.transposed else weight)).to(x.dtype)
        flat_x, flat_g = x.reshape(-1, x.shape[-1]).to(g.dtype), g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[1]:
            delta = ctx.site.gradient(*((flat_x, flat_g) if ctx.transposed else (flat_g, flat_x)))
        if ctx.needs_input_grad[3]:
            bias = flat_g.sum(0)
        return dx, delta, None, bias, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t(), bias) if transposed else linear(x, weight, bias)


def _forward(module: Any, x: Tensor, transposed: bool) -> Tensor:
    delta, site = module._parameters[DELTA], module.site
    if delta is not site.delta:
        return _product(x, site.displaced(delta), module.bias, transposed)
    site.swap_in()
    if not torch.is_grad_enabled():
        return _product(x, module.weight, module.bias, transposed)
    return _Product.apply(x, delta, module.weight, module.bias, site, transposed)


class SparseLinear(nn.Linear):
    """A linear layer with deltas in its weight. A plain layer becomes one by its class, so its names stay."""

    site: Site

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, False)


class SparseConv1D(Conv1D):
    """The same of transformers' Conv1D, whose weight is [in, out]."""

    site: Site

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, True)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def install(module: nn.Module, index: Tensor) -> Site:
    """Give a layer of one of `KINDS` deltas at flat positions of its weight."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    module.site = site = Site(weight, index)  # type: ignore[assignment]
    module.register_parameter(DELTA, site.delta)
    module.__class__ = KINDS[type(module)]
    return site


def strip(model: nn.Module) -> nn.Module:
    """Make the layers of a model plain again; their weights stay as they are."""
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
