"""Sub-tokens projected on fixed unit vectors: the vectors, where they come from, and the one copy that layers share.

A token x [D] is split into G sub-tokens x_g of size M, the last one padded with zeros; what is kept is z_g = x_g . v_g.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from smidgen import noise
from smidgen.config import notice
from smidgen.noise import philox

Init = Literal["mean", "power", "random"]

_POWER = 16  # power iterations on the M x M Gram matrix; chosen: they cost next to nothing beside making it
_LARGE = 1 << 18  # elements from which a compiled kernel may project an input; chosen: numba loads once a run needs it
_BLOCK = 1 << 20  # elements of float32 workspace where 16-bit values are converted (4 MB); chosen


class Projection:
    """The vectors of one input and what was last projected on them. Layers that read the same tensor share one object.

    `v` [1, M], or [G, M] per group or where the last sub-token is ragged; None until `choose` was called.
    """

    def __init__(self, name: str, width: int, groups: int, size: int):
        self.name, self.width, self.groups, self.size = name, width, groups, size
        self.v: Tensor | None = None
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # an input, its version, its projections

    def choose(self, x: Tensor, valid: Tensor | None, init: Init, per_group: bool, at: noise.Address) -> None:
        """Fix the vectors, from x [..., D] at valid tokens [...] (all when None), summed over ranks, or at random.

        mean: the mean of the sub-tokens; power: their first right singular vector, from the mean on; random: Gaussian.
        """
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = self.groups if per_group else 1
        if without_storage(x):
            rows = self.groups if self.groups * self.size > self.width else rows
            self.v = x.new_empty(rows, self.size, dtype=kind)
            return
        if init == "random":
            v = torch.zeros(rows, self.size, device=x.device)
            noise.accumulate_(v, [(at, 1.0)], "gaussian")
            v = v.double()
        else:
            tokens = x.flatten(0, -2) if valid is None else x[valid]
            parts = self._split(tokens.to(kind))  # [T, G, M]
            v = _over_ranks(parts.sum(0).double())
            v = v if per_group else v.sum(0, keepdim=True)
            if init == "power":
                parts = parts.transpose(0, 1) if per_group else parts.flatten(0, 1)[None]
                gram = _over_ranks((parts.mT @ parts).double())  # [rows, M, M]
                for _ in range(_POWER):
                    v = _units(torch.einsum("gmn,gn->gm", gram, v), self.name)
        if self.groups * self.size > self.width:  # the last vector is cut and made a unit again
            v = v.expand(self.groups, -1).clone()
            v[-1, self.width - self.groups * self.size :] = 0
        self.v = _units(v, self.name).to(kind)

    def project(self, x: Tensor) -> Tensor:
        """z [T, G] of x [..., D], in x's dtype; 16-bit inputs are multiplied in float32. The same tensor that was
        projected last is not projected again; its projections are forgotten with it."""
        if self._last is not None and self._last[0]() is x and self._last[1] == x._version:
            return self._last[2]
        z = self._project(x.detach().flatten(0, -2))
        self._last = weakref.ref(x, self._forget), x._version, z
        return z

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None

    def _project(self, tokens: Tensor) -> Tensor:
        assert self.v is not None
        compiled = None
        # On a CPU one vector for all groups is a plain matrix-vector product, at which torch is the faster.
        large = tokens.numel() >= _LARGE and tokens.is_contiguous() and not without_storage(tokens)
        if large and (len(self.v) > 1 or tokens.device.type != "cpu"):
            compiled = _kernel(tokens.device.type, tokens.dtype)
        return self._twin(tokens) if compiled is None else compiled(tokens, self.v, self.groups)

    def _twin(self, tokens: Tensor) -> Tensor:
        """What the compiled kernels compute, in plain torch."""
        if tokens.element_size() >= 4:
            return self._multiply(tokens)
        step = max(1, _BLOCK // self.width)
        parts = [self._multiply(tokens[i : i + step].float()).to(tokens.dtype) for i in range(0, len(tokens), step)]
        return torch.cat(parts) if parts else tokens.new_empty(0, self.groups)

    def _multiply(self, tokens: Tensor) -> Tensor:
        assert self.v is not None
        if len(self.v) == 1:  # one matrix-vector product over the tokens as they lie in memory
            return (tokens.reshape(-1, self.size) @ self.v[0]).view(-1, self.groups)
        return torch.einsum("tgm,gm->tg", self._split(tokens), self.v)

    def _split(self, tokens: Tensor) -> Tensor:
        """[T, D] -> [T, G, M]; a copy only where padding is needed."""
        missing = self.groups * self.size - self.width
        return (F.pad(tokens, (0, missing)) if missing else tokens).unflatten(1, (self.groups, self.size))


def without_storage(x: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as in the simulation of a step (`smidgen.simulate`)."""
    return isinstance(x, FakeTensor)


def address(seed: int, tensor: int) -> noise.Address:
    """Where the noise of random vectors lives."""
    return noise.Address(seed, tensor, 0, 0, philox.INIT)


@functools.cache
def _kernel(device: str, kind: torch.dtype) -> Callable[..., Tensor] | None:
    """What projects tokens of a device and dtype in one pass: numba on a CPU, Triton on CUDA; None where there is none."""
    name = {"cpu": "cpu", "cuda": "cuda"}.get(device)
    if name is None:
        return None
    try:
        module = importlib.import_module(f"smidgen.activations._projection_{name}")
    except ImportError as error:
        notice(f"velora: projections on {device} are made by plain torch: {error}")
        return None
    return module.project if kind in module.KINDS else None  # type: ignore[no-any-return]


def _units(v: Tensor, name: str) -> Tensor:
    """Rows of length 1; a row of zeros becomes the constant vector, said in one line."""
    norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all()):
        notice(f"velora: the first inputs of {name} are not finite: its vectors are constant instead of their mean")
        v, norms = torch.ones_like(v), torch.full_like(norms, v.shape[1] ** 0.5)
    elif not bool(norms.all()):
        notice(f"velora: the first inputs of {name} average to zero: its vectors are constant where they do")
        v = torch.where(norms > 0, v, 1.0)
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / norms


def _over_ranks(total: Tensor) -> Tensor:
    """The sum over ranks, so that all of them fix the same vectors."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total
