"""ParamView: the only access to tuned storage.

A view lists the tensors that a run tunes, once each (tied tensors are one entry), under canonical names that survive
wrapping by PEFT, DDP or torch.compile, with a stable 32-bit id that addresses their noise. `apply_`, `write_`
and `edit_` are the only writers of tuned weights; all compute in float32 and round once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from smidgen import noise
from smidgen.addend import Addend, refusal
from smidgen.directions import Dense, Masked, OnePass, Probe, restrict, width
from smidgen.placed import home

Rounding = Literal["stochastic", "nearest"]

_BLOCK = 1 << 20  # elements of float32 workspace in the general update path (4 MB); chosen
_SHELVED = 1 << 22  # elements of a tensor on disk that an update holds in memory (16 MB in float32); chosen
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")


def canonical(name: str) -> str:
    """The parameter's name as the unwrapped model spells it.

    >>> canonical("module.base_model.model.classifier.modules_to_save.default.weight")
    'classifier.weight'
    >>> canonical("base_model.model.q_proj.base_layer.weight")
    'q_proj.weight'
    """
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    parts, out = name.split("."), []
    skip = False
    for part in parts:
        if skip:  # the adapter's name after `modules_to_save`
            skip = False
        elif part == "modules_to_save":
            skip = True
        elif part not in ("base_layer", "_orig_mod"):
            out.append(part)
    return ".".join(out)


def tensor_id(name: str) -> int:
    """32 bits of a stable hash of a canonical name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class Support:
    """Where in a matrix [o, i] the elements of a 1-D tensor act: sorted distinct positions, kept as compressed rows.

    Bytes: 2 an element (4 where i > 65,536) and 4 a row.
    """

    def __init__(self, shape: tuple[int, int], index: Tensor):
        self.shape = shape
        self.move(index)

    def move(self, index: Tensor) -> None:
        """Other positions: flat, row-major, sorted, distinct."""
        rows, columns = self.shape
        index = index.long()
        edges = torch.arange(rows + 1, device=index.device) * columns
        self._starts = torch.searchsorted(index, edges).int()
        self._columns = (index % columns).to(torch.int16 if columns <= 1 << 16 else torch.int32)

    @property
    def rows(self) -> Tensor:
        """The row of each element, int32 [k], made anew."""
        rows = torch.arange(self.shape[0], device=self._starts.device, dtype=torch.int32)
        return torch.repeat_interleave(rows, torch.diff(self._starts), output_size=len(self))

    @property
    def columns(self) -> Tensor:
        """The column of each element, int32 [k]."""
        return self._columns.int() & 0xFFFF if self._columns.dtype == torch.int16 else self._columns

    @property
    def index(self) -> Tensor:
        """Flat positions [k], made anew: int32, or int64 where the matrix has 2^31 entries or more."""
        rows = self.rows if self.shape[0] * self.shape[1] < 2**31 else self.rows.long()
        return rows * self.shape[1] + self.columns

    def __len__(self) -> int:
        return self._columns.numel()

    def nbytes(self) -> int:
        """Bytes held."""
        return self._columns.nbytes + self._starts.nbytes


class SparseShape(tuple[int, ...]):
    """The shape (k,) of a tensor with a support, which knows the matrix."""

    matrix: tuple[int, int]


@dataclass
class Entry:
    """One tuned tensor."""

    name: str
    id: int
    tensor: Tensor
    sites: list[tuple[nn.Module, str]] = field(default_factory=list)  # every (owner module, attribute) that holds it
    version: int = 0  # grows by one at each write: caches of activations key on it
    support: Support | None = None  # of a tensor whose elements are added to some entries of a frozen matrix
    addend: Addend | None = None  # of a weight that cannot be written; `tensor` only stands in for its shape and dtype
    areas: Sequence[tuple[slice, slice]] = ()  # (rows, columns) that a small space moves; empty: the whole tensor

    @property
    def storage(self) -> Tensor:
        """The tensor without autograd history, sharing memory; NaN where it only stands in."""
        return self.tensor.detach()


class ParamView:
    """The tuned tensors of a run, by canonical name, in the model's order.

    Raises ValueError for equal canonical names or equal ids, and for tensors without elements.
    """

    def __init__(self, entries: Iterable[Entry], *, positional: bool = False):
        self.entries: dict[str, Entry] = {}
        self.positional = positional  # ids are positions, not hashes of names; the journal says so
        by_id: dict[int, str] = {}
        for entry in entries:
            if entry.name in self.entries:
                raise ValueError(f"two tuned tensors are both called {entry.name!r}: rename one of them")
            if entry.id in by_id:
                raise ValueError(f"{entry.name!r} and {by_id[entry.id]!r} have the same noise id: rename one of them")
            if entry.tensor.numel() == 0:
                raise ValueError(f"{entry.name!r} has no elements; freeze it with requires_grad_(False)")
            self.entries[entry.name] = entry
            by_id[entry.id] = entry.name
        if not self.entries:
            raise ValueError("nothing to tune: no tensor has requires_grad=True")

    @classmethod
    def of_model(cls, model: nn.Module, *, tuned: Callable[[str], bool] | None = None) -> ParamView:
        """The parameters of `model` with requires_grad (narrowed by `tuned`, a test of the canonical name)."""
        found: dict[int, Entry] = {}
        for prefix, module in model.named_modules(remove_duplicate=True):
            for attribute, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or "original_module" in prefix.split("."):
                    continue
                name = canonical(f"{prefix}.{attribute}" if prefix else attribute)
                if tuned is not None and not tuned(name):
                    continue
                tensor = home(module, attribute, parameter)
                entry = found.setdefault(id(tensor), Entry(name, tensor_id(name), tensor))
                entry.sites.append((module, attribute))
        return cls(found.values())

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> ParamView:
        """Bare tensors; each is called and addressed by its position."""
        return cls((Entry(str(i), i, t) for i, t in enumerate(tensors)), positional=True)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    @property
    def ids(self) -> dict[str, int]:
        """Noise id of each tensor."""
        return {e.name: e.id for e in self}

    def numel(self) -> int:
        """Number of tuned weights, d."""
        return sum(e.tensor.numel() for e in self)

    def nbytes(self) -> int:
        """Bytes of the tuned weights."""
        return sum(e.tensor.numel() * e.tensor.element_size() for e in self)

    def apply_(
        self,
        probe: Probe,
        *,
        at: noise.Address,
        decay: float | Mapping[str, float] = 1.0,
        names: Iterable[str] | None = None,
        rounding: Rounding = "stochastic",
    ) -> None:
        """theta <- round(decay * theta + sum(scale * z)): one pass over each tensor, float32 arithmetic, one rounding.

        `at` addresses the bits of the stochastic rounding (its tensor field is replaced by each tensor's id), `names`
        restricts the update to some tensors, `decay` may differ by name. Weights that the mask of all terms leaves out do
        not change, nor decay. Cost: one sweep over the written tensors.
        """
        z, scale = probe[0] if len(probe) == 1 else (None, 0.0)
        at_once: list[Entry] = []
        decays = []
        for name in self.entries if names is None else names:
            entry = self.entries[name]
            terms = restrict(probe, name)
            factor = decay if isinstance(decay, (int, float)) else decay.get(name, 1.0)
            if not terms and factor == 1.0:
                continue
            if terms and type(z) is Dense and _plain(entry):
                at_once.append(entry)
                decays.append(factor)
            else:
                self._apply_entry(entry, terms, factor, replace(at, tensor=entry.id), rounding)
            entry.version += 1
        if at_once:
            assert type(z) is Dense
            weights, ids, bits = [e.storage for e in at_once], [e.id for e in at_once], at if rounding == "stochastic" else None
            noise.all_(weights, weights, ids, (z.address(at_once[0].name), scale), z.distribution, decays=decays, at=bits)

    def _apply_entry(self, entry: Entry, probe: Probe, decay: float, at: noise.Address, rounding: Rounding) -> None:
        if entry.addend is not None:
            entry.addend.take_(entry.name, probe, decay)
            return
        weight = entry.storage if entry.tensor.is_contiguous() else entry.storage.contiguous()
        whole, give_back = OnePass.of(probe, entry.name), getattr(entry.tensor, "release", None)
        if whole is not None:
            many = max(1, _SHELVED // width(weight)) if give_back and weight.ndim and whole.keep is None else 0
            parts = zip(itertools.count(0, many * width(weight)), weight.split(many), strict=False) if many else [(0, weight)]
            for start, part in parts:
                noise.update_(
                    part, whole.terms, whole.distribution, decay=decay, rounding=rounding, at=at, keep=whole.keep, start=start
                )
                if give_back:
                    give_back()
        else:
            if decay != 1.0 and any(isinstance(z, Masked) for z, _ in probe):
                raise ValueError(f"decay of {entry.name!r} is not defined where its directions differ in their masks")
            matrix = weight.view(-1, width(weight))
            step = max(1, _BLOCK // matrix.shape[1])
            for first in range(0, matrix.shape[0], step):
                rows = slice(first, min(first + step, matrix.shape[0]))
                value32 = matrix[rows].to(torch.float32, copy=True)
                if decay != 1.0:
                    value32.mul_(decay)
                for z, s in probe:
                    z.accumulate(entry.name, rows, value32, s)
                noise.write_(matrix[rows], value32, rounding=rounding, at=at, start=first * matrix.shape[1])
        if weight.data_ptr() != entry.tensor.data_ptr():
            entry.storage.copy_(weight)

    def write_(
        self, name: str, value32: Tensor, *, at: noise.Address, rows: slice | None = None, rounding: Rounding = "stochastic"
    ) -> None:
        """theta[name][rows] <- round(value32), with the same addressed rounding as `apply_`. value32: float32."""
        entry = self._writable(name)
        weight = entry.storage if entry.tensor.is_contiguous() else entry.storage.contiguous()
        target, start = weight, 0
        if rows is not None:
            first, stop, _ = rows.indices(weight.shape[0])
            target, start = weight[first:stop], first * width(weight)
        noise.write_(target, value32.contiguous(), rounding=rounding, at=replace(at, tensor=entry.id), start=start)
        if weight.data_ptr() != entry.tensor.data_ptr():
            entry.storage.copy_(weight)
        entry.version += 1

    def edit_(
        self, name: str, update: Callable[[Tensor], None], *, at: noise.Address, rounding: Rounding = "stochastic"
    ) -> None:
        """Let `update` change theta[name] in place in float32: the weight itself, or for 16-bit weights a temporary
        float32 copy of this one tensor that is rounded once when it is written back."""
        entry = self._writable(name)
        weight = entry.storage
        master = weight.float()
        update(master)
        if master is weight:
            entry.version += 1
        else:
            self.write_(name, master, at=at, rounding=rounding)

    def _writable(self, name: str) -> Entry:
        """The entry, if its tensor can be written. Raises ConfigError."""
        if self.entries[name].addend is not None:
            raise refusal(name)
        return self.entries[name]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every tuned tensor (one full copy of their bytes)."""
        return {name: self._writable(name).storage.clone() for name in self.entries}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put a snapshot back, bit for bit."""
        for name, value in saved.items():
            self.entries[name].storage.copy_(value)
            self.entries[name].version += 1


def shapes(view: ParamView) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    """What `state_bytes` of a method wants to know about the tuned tensors."""
    return {e.name: (_shape(e), e.tensor.dtype) for e in view}


def _plain(entry: Entry) -> bool:
    """Whether a pass of noise writes to a tensor as it lies in memory."""
    return entry.addend is None and entry.tensor.is_contiguous() and getattr(entry.tensor, "release", None) is None


def _shape(entry: Entry) -> tuple[int, ...]:
    if entry.support is None:
        return tuple(entry.tensor.shape)
    shape = SparseShape(entry.tensor.shape)
    shape.matrix = entry.support.shape
    return shape
