"""Addressed noise: z is a pure function of (seed, tensor, step, query, purpose) and the element's number.

Any tensor, row or range can be regenerated alone, on any device, in any order; no generator exists and the global ones
are never touched. `philox` defines the values in plain torch; `cpu` (numba) and `cuda` (Triton) give the same bits in one
pass over the weights.

    out <- w + sum(s z)       displace_, displace_rows_ (an embedding's looked-up rows): rounded to nearest
    w   <- d w + sum(s z)     update_: float32 arithmetic, one rounding, stochastic by default
    w   <- value              write_: the same rounding for values computed elsewhere
    out32 += sum(s z)         accumulate_
    many tensors at once      all_: each as displace_ or update_ with one term has it; one launch on CUDA

Tensors are contiguous (ValueError otherwise), float32, bfloat16 or float16; float64 goes through the torch twin. Sums run
in float32 from left to right, scales rounded to float32 first. `start` is the element number of a tensor's first
element, so that blocks of rows can be worked on alone. Stochastic rounding applies to 16-bit tensors only.

`keep` masks an operation: an element that it does not keep stays as it is (displaced: is its weight), bit for bit, also
under decay; a kept one gets the bits that it would get without a mask. Masks are drawn (`Drawn`) or packed bits (`pack`).

Displacements along one term may find it in memory (`Held`) instead of in the call: then a captured CUDA graph can be replayed
along another.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from smidgen.noise import philox
from smidgen.noise.address import Address, Held, Term
from smidgen.noise.philox import (
    DATA,
    INIT,
    MASK,
    PROBE,
    ROUND,
    SUBSPACE,
    VERSION,
    Distribution,
    Drawn,
    Keep,
    check_range,
    kept,
    pack,
    sample,
)

__all__ = [
    "DATA",
    "INIT",
    "MASK",
    "PROBE",
    "ROUND",
    "SUBSPACE",
    "VERSION",
    "Address",
    "Distribution",
    "Drawn",
    "Held",
    "Keep",
    "Rounding",
    "Term",
    "accumulate_",
    "all_",
    "backend",
    "displace_",
    "displace_rows_",
    "kept",
    "pack",
    "sample",
    "update_",
    "use",
    "write_",
]

Rounding = Literal["stochastic", "nearest"]

log = logging.getLogger("smidgen")

_MODULES = {"numba": "smidgen.noise.cpu", "triton": "smidgen.noise.cuda", "torch": "smidgen.noise.philox"}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_NATIVE = {"cpu": "numba", "cuda": "triton"}
_NOWHERE = Address(0, 0, 0, 0, 0)
_forced: ContextVar[str | None] = ContextVar("noise backend", default=None)


def displace_(
    out: Tensor,
    weight: Tensor,
    terms: Sequence[Term] | Held,
    distribution: Distribution,
    *,
    start: int = 0,
    keep: Keep | None = None,
) -> None:
    """out <- nearest(weight + sum(scale * z)) in out's dtype. `out` and `weight` have one shape and may be one tensor."""
    _fit(out, weight)
    _run(out, weight, None, terms, distribution, 1.0, None, start, keep)


def displace_rows_(
    out: Tensor,
    weight: Tensor,
    rows: Tensor,
    terms: Sequence[Term] | Held,
    distribution: Distribution,
    *,
    keep: Keep | None = None,
) -> None:
    """out[i] <- nearest(weight[rows[i]] + sum(scale * z[rows[i]])). weight [V, D], rows int64 [n], out [n, D].

    Raises IndexError for rows that the weight does not have; not on CUDA, where looking would cost a synchronisation.
    """
    if weight.ndim != 2 or rows.ndim != 1 or rows.dtype != torch.int64 or out.shape != (len(rows), weight.shape[1]):
        raise ValueError(
            f"out {tuple(out.shape)}, weight {tuple(weight.shape)} and rows {tuple(rows.shape)} {rows.dtype} do not fit: "
            "they must be [n, D], [V, D] and int64 [n]"
        )
    _run(out, weight, rows, terms, distribution, 1.0, None, 0, keep)


def accumulate_(
    out32: Tensor, terms: Sequence[Term], distribution: Distribution, *, start: int = 0, keep: Keep | None = None
) -> None:
    """out32 += sum(scale * z), float32."""
    if out32.dtype != torch.float32:
        raise ValueError(f"out32 is {out32.dtype}; sums of noise are float32")
    _run(out32, out32, None, terms, distribution, 1.0, None, start, keep)


def update_(
    weight: Tensor,
    terms: Sequence[Term],
    distribution: Distribution,
    *,
    decay: float = 1.0,
    rounding: Rounding = "stochastic",
    at: Address,
    start: int = 0,
    keep: Keep | None = None,
) -> None:
    """weight <- round(decay * weight + sum(scale * z)): one pass, one rounding. `at` addresses the rounding's bits."""
    _run(weight, weight, None, terms, distribution, decay, _rounding(rounding, at), start, keep)


def all_(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    ids: Sequence[int],
    term: Term | Held,
    distribution: Distribution,
    *,
    decays: Sequence[float] | None = None,
    at: Address | None = None,
) -> None:
    """outs[i] <- round(decays[i] * weights[i] + scale * z) for whole tensors, each with the bits that it has alone.

    Tensor i has its noise at the term's address, and its rounding at `at` (to nearest where that is None), with ids[i] for the
    tensor there.
    On CUDA tensors of one dtype share a launch, which takes longer than the noise of a small one; elsewhere they take turns.
    """
    if not outs:
        return
    for out, weight in zip(outs, weights, strict=True):
        _fit(out, weight)
    device = outs[0].device
    held = term if isinstance(term, Held) else None
    z, scale = (_NOWHERE, 0.0) if isinstance(term, Held) else term
    if device.type == "cuda" and backend(device) == "triton":
        many = importlib.import_module("smidgen.noise.cuda_many")
        many.all_(outs, weights, ids, z, scale, distribution, decays, at, _check, held)
        _changed(outs)
        return
    for i, (out, weight, tensor) in enumerate(zip(outs, weights, ids, strict=True)):
        mine = [(replace(z, tensor=tensor), scale)] if held is None else replace(held, tensor=tensor)
        here = None if at is None else replace(at, tensor=tensor)
        _run(out, weight, None, mine, distribution, 1.0 if decays is None else decays[i], here, 0, None)


def write_(weight: Tensor, value32: Tensor, *, rounding: Rounding, at: Address, start: int = 0) -> None:
    """weight <- round(value32), float32 values of the weight's shape."""
    if weight.shape != value32.shape or value32.dtype != torch.float32:
        raise ValueError(
            f"value32 is {value32.dtype} {tuple(value32.shape)}; it must be float32 of the weight's shape {tuple(weight.shape)}"
        )
    _run(weight, value32, None, (), "rademacher", 1.0, _rounding(rounding, at), start, None)


def backend(device: torch.device | str) -> str:
    """Which implementation works on tensors of this device: "numba", "triton" or "torch". Loads it."""
    forced = _forced.get()
    return forced or _load(torch.device(device).type)[0]


@contextmanager
def use(name: Literal["numba", "triton", "torch"]) -> Iterator[None]:
    """Force a backend inside the block, for tests. One that cannot be loaded raises ImportError."""
    if name not in _MODULES:
        raise ValueError(f"backend {name!r} is unknown; there are {', '.join(_MODULES)}")
    importlib.import_module(_MODULES[name])
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _load(device_type: str) -> tuple[str, Callable[..., None]]:
    """Name and function of the backend for a type of device; says in one line when it is only the torch twin."""
    name = _NATIVE.get(device_type)
    if name is None:
        log.warning("noise on %s is generated by plain torch: there is no compiled kernel for this device", device_type)
        return "torch", philox.apply_
    try:
        return name, importlib.import_module(_MODULES[name]).apply_
    except ImportError as error:
        log.warning("noise on %s is generated by plain torch, some 100 times slower: %s (needs %s)", device_type, error, name)
        return "torch", philox.apply_


def _run(
    out: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    terms: Sequence[Term] | Held,
    distribution: Distribution,
    decay: float,
    at: Address | None,
    start: int,
    keep: Keep | None,
) -> None:
    """Check what backends take for granted and hand over. The operations are all out <- round(decay * weight + sum)."""
    _check(out, weight, rows, distribution, start, at is not None, keep)
    if not isinstance(keep, Tensor) and keep is not None and keep.digits == 0 and keep.threshold:
        keep = None  # all elements
    forced = _forced.get()
    apply_ = _load(weight.device.type)[1] if forced is None else importlib.import_module(_MODULES[forced]).apply_
    if not isinstance(terms, Held):
        apply_(out, weight, rows, terms, distribution, decay, at, start, keep)
    elif apply_.__module__ == _MODULES["triton"]:
        apply_(out, weight, rows, (), distribution, decay, at, start, keep, terms)  # type: ignore[call-arg]
    else:
        apply_(out, weight, rows, [terms.term()], distribution, decay, at, start, keep)
    if apply_ is not philox.apply_:
        _changed((out,))


def _fit(out: Tensor, weight: Tensor) -> None:
    if out.shape != weight.shape:
        raise ValueError(f"out has shape {tuple(out.shape)} and weight {tuple(weight.shape)}; they must be equal")


def _changed(outs: Sequence[Tensor]) -> None:
    """A compiled kernel writes behind autograd's back."""
    torch.autograd.graph.increment_version([out for out in outs if not out.is_inference()])


def _check(
    out: Tensor, weight: Tensor, rows: Tensor | None, distribution: Distribution, start: int, rounds: bool, keep: Keep | None
) -> None:
    if not (out.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"noise works on contiguous tensors; strides are {out.stride()} and {weight.stride()} for shapes "
            f"{tuple(out.shape)} and {tuple(weight.shape)}"
        )
    if out.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(f"noise works on float32, bfloat16, float16 and float64, not on {out.dtype} and {weight.dtype}")
    device = weight.device
    if out.device != device or (rows is not None and rows.device != device):
        raise ValueError(f"the tensors are on different devices, {out.device} and {device}")
    check_range(distribution, start, weight.numel(), rounds, isinstance(keep, Drawn))
    if isinstance(keep, Tensor):
        _check_bits(keep, device, start + weight.numel())


def _check_bits(keep: Tensor, device: torch.device, elements: int) -> None:
    if keep.dtype != torch.uint8 or keep.ndim != 1 or not keep.is_contiguous() or keep.device != device:
        raise ValueError(
            f"a bit mask is a contiguous uint8 vector on {device}, not {keep.dtype} {tuple(keep.shape)} on {keep.device}"
        )
    if 8 * len(keep) < elements:
        raise ValueError(f"the mask has {8 * len(keep)} bits for {elements} elements")


def _rounding(rounding: Rounding, at: Address) -> Address | None:
    if rounding == "stochastic":
        return at
    if rounding == "nearest":
        return None
    raise ValueError(f"rounding {rounding!r} is unknown; there are 'stochastic' and 'nearest'")
