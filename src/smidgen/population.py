"""P probes in one forward: what each module adds to the product with its frozen weights.

Rows come probe by probe, P * B of them. A linear layer makes one product with W for all rows; what a probe adds is thin:

    Y_p = X_p W^T + (X_p B_p) A_p^T + b_p          W [O, D], B_p [D, r], A_p [O, r], the scale folded into A_p

Embeddings add A_p[ids] B_p^T, norms and other vectors are displaced once a probe, the output head gets the same thin
products in vocabulary blocks. `smidgen.batched` decides when; nothing here writes to a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.directions import Probe, displace, restrict
from smidgen.linear import linear
from smidgen.loss import BLOCK_ELEMENTS
from smidgen.lowrank import Factored
from smidgen.params import Entry


class Population:
    """The factors and vectors of P probes for one evaluation, made when a module asks for them."""

    def __init__(self, probes: Sequence[Probe]):
        self.probes = probes

    def __len__(self) -> int:
        return len(self.probes)

    def touches(self, name: str) -> bool:
        """Whether any probe displaces a tensor."""
        return any(restrict(probe, name) for probe in self.probes)

    def factors(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """(A [P, m, R], B [n, R]) with the scales folded into A; B is [P, n, R] where the probes do not share it.

        Probes share B when they draw from the same subspaces; R is then the sum of the subspaces' ranks.
        """
        m = entry.tensor.shape[0]
        lefts: list[dict[Hashable, Tensor]] = []
        rights: dict[Hashable, Tensor] = {}
        drawn: dict[int, Tensor] = {}  # left factors by direction: a mirrored pair has the same one
        for probe in self.probes:
            mine: dict[Hashable, Tensor] = {}
            for z, scale in restrict(probe, entry.name):
                assert isinstance(z, Factored)
                key = z.right_key(entry.name)
                if key not in rights:
                    rights[key] = z.right(entry.name)
                if id(z) not in drawn:
                    drawn[id(z)] = z.left(entry.name)
                left = drawn[id(z)] * scale
                mine[key] = mine[key] + left if key in mine else left
            lefts.append(mine)
        shared = sum(right.shape[1] for right in rights.values())
        own = max(sum(left.shape[1] for left in mine.values()) for mine in lefts)
        if shared <= 2 * own:  # a product for all rows costs less than one for each probe, even if half of it is with zeros
            A = next(iter(rights.values())).new_zeros(len(self), m, shared)
            at = 0
            for key, right in rights.items():
                for p, mine in enumerate(lefts):
                    if key in mine:
                        A[p, :, at : at + right.shape[1]] = mine[key]
                at += right.shape[1]
            return A, torch.cat(list(rights.values()), 1)
        n = next(iter(rights.values())).shape[0]
        A = next(iter(rights.values())).new_zeros(len(self), m, own)
        B = A.new_zeros(len(self), n, own)
        for p, mine in enumerate(lefts):
            at = 0
            for key, left in mine.items():
                A[p, :, at : at + left.shape[1]] = left
                B[p, :, at : at + left.shape[1]] = rights[key]
                at += left.shape[1]
        return A, B

    def vectors(self, entry: Entry) -> Tensor:
        """Displaced values of a tensor without factors, [P, *shape], in its dtype."""
        weight = entry.storage.contiguous()
        out = weight.new_empty((len(self), *weight.shape))
        for p, probe in enumerate(self.probes):
            if restrict(probe, entry.name):
                displace(probe, entry.name, weight, out[p])
            else:
                out[p] = weight
        return out


def thin(X: Tensor, A: Tensor, B: Tensor, onto: Tensor) -> Tensor:
    """onto + (X B) A^T for each probe, in place where `onto` allows. X [P * n, D], onto [P * n, O]; A [P, O, r]."""
    probes = A.shape[0]
    A, B = A.to(X.dtype), B.to(X.dtype)
    X = X.reshape(-1, X.shape[-1])
    inner = torch.bmm(X.view(probes, -1, X.shape[1]), B) if B.ndim == 3 else (X @ B).view(probes, -1, B.shape[1])
    flat = onto.view(probes, -1, onto.shape[-1])
    return torch.baddbmm(flat, inner, A.transpose(1, 2), out=flat).view(onto.shape)


class _LookedUp(Tensor):
    """An embedding matrix that gives each row of the ids the rows of its own probe."""

    table: Tensor
    A: Tensor  # [P, V, r]
    B: Tensor  # [D, r] or [P, D, r]
    rows: int  # rows of the whole batch, P * B

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding:
                ids, matrix = args[0], args[1] if len(args) > 1 else kwargs["weight"]
                if isinstance(matrix, cls) and not isinstance(ids, cls):
                    return matrix.lookup(ids)
            if getattr(func, "__name__", "") == "__get__":
                return func(*args, **kwargs)
        raise NotBatchedError(f"{getattr(func, '__name__', func)} of an embedding matrix")

    def lookup(self, ids: Tensor) -> Tensor:
        """Displaced rows, [*ids.shape, D]; ids without a batch axis (positions) get one."""
        if ids.ndim == 1:
            ids = ids[None]
        if ids.shape[0] == 1:
            ids = ids.expand(self.rows, *ids.shape[1:])
        found = F.embedding(ids, self.table)
        probes = self.A.shape[0]
        picked = ids.reshape(probes, -1)
        A = torch.gather(self.A, 1, picked[:, :, None].expand(-1, -1, self.A.shape[2]))  # [P, n, r]
        B = self.B.expand(probes, *self.B.shape[-2:])
        flat = found.view(probes, -1, found.shape[-1])
        return torch.baddbmm(flat, A.to(flat.dtype), B.to(flat.dtype).transpose(1, 2)).view(found.shape)


class NotBatchedError(RuntimeError):
    """A tuned tensor is used in a way that has no batched form; the reason in words."""


def linear_like(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def after_linear(
    people: Population, tensors: dict[str, Entry], module: nn.Module, args: tuple[Tensor, ...], out: Tensor
) -> Tensor:
    probes, x = len(people), args[0]
    out = out.contiguous()
    if "weight" in tensors:
        A, B = people.factors(tensors["weight"])
        multiply = thin if isinstance(module, nn.Linear) else _thin_transposed  # Conv1D stores W [D, O]
        out = multiply(x, A, B, out)
    if "bias" in tensors:
        delta = people.vectors(tensors["bias"]) - tensors["bias"].storage
        out = (out.view(probes, -1, out.shape[-1]) + delta[:, None]).view(out.shape)
    return out


def _thin_transposed(x: Tensor, A: Tensor, B: Tensor, onto: Tensor) -> Tensor:
    """onto + (X A_p) B_p^T, for weights stored [D, O]."""
    probes = A.shape[0]
    X = x.reshape(probes, -1, x.shape[-1])
    inner = torch.bmm(X, A.to(X.dtype))
    right = B.to(X.dtype).expand(probes, *B.shape[-2:]).transpose(1, 2)
    flat = onto.view(probes, -1, onto.shape[-1])
    return torch.baddbmm(flat, inner, right).view(onto.shape)


def around_embedding(
    module: nn.Embedding, people: Population, entry: Entry, rows: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    original = module.weight

    def enter(*_: Any) -> None:
        table = torch.Tensor._make_subclass(_LookedUp, entry.storage)
        table.table, table.rows = entry.storage, rows
        table.A, table.B = people.factors(entry)
        module._parameters["weight"] = table  # type: ignore[assignment]

    def leave(*_: Any) -> None:
        module._parameters["weight"] = original  # type: ignore[assignment]

    return enter, leave


def layer_norm(module: nn.LayerNorm, people: Population, tensors: dict[str, Entry], x: Tensor) -> Tensor:
    """nn.LayerNorm with weights of its own for each probe."""
    out = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    flat = out.view(len(people), -1, out.shape[-1])
    weight = people.vectors(tensors["weight"])[:, None] if "weight" in tensors else module.weight
    bias = people.vectors(tensors["bias"])[:, None] if "bias" in tensors else module.bias
    flat = flat * weight if weight is not None else flat
    return (flat + bias if bias is not None else flat).view(x.shape)


def around_vectors(
    module: nn.Module, people: Population, tensors: dict[str, Entry]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Other modules with vectors, such as RMS norms: the vector gets the input's axes and broadcasts over rows."""
    originals = {a: module._parameters[a] for a in tensors}

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        for attribute, entry in tensors.items():
            values = people.vectors(entry)
            each = x.shape[0] // len(people)
            shape = (x.shape[0], *[1] * (x.ndim - 2), *entry.tensor.shape)
            module._parameters[attribute] = values.repeat_interleave(each, 0).view(shape)  # type: ignore[assignment]

    def leave(*_: Any) -> None:
        module._parameters.update(originals)

    return enter, leave


class PopulationHead:
    """The output head of a population; hidden states come probe by probe."""

    def __init__(self, head: nn.Linear, entry_of: Callable[[Tensor], Entry | None], people: Population):
        self._weight, self._bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self._people = people
        entry = entry_of(head.weight)
        self._factors = people.factors(entry) if entry is not None and people.touches(entry.name) else None
        tuned = entry_of(head.bias) if head.bias is not None else None
        self._biases = people.vectors(tuned) if tuned is not None and people.touches(tuned.name) else None

    def logits(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        """Logits [P * n, rows], float32, of some rows of the vocabulary."""
        weight = self._weight[rows]
        shared = self._bias is not None and self._biases is None
        out = linear(hidden, weight, self._bias[rows] if shared else None)  # type: ignore[index]
        if self._factors is not None:
            A, B = self._factors
            out = thin(hidden, A[:, rows], B, out)
        if self._biases is not None:
            probes = len(self._people)
            out = (out.view(probes, -1, out.shape[-1]) + self._biases[:, rows][:, None]).view(out.shape)
        return out.float()

    def nll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """-log softmax(logits)[tokens], [P * n], in vocabulary blocks with a running log-sum-exp."""
        n, vocabulary = hidden.shape[0], self._weight.shape[0]
        high = torch.full((n,), -torch.inf, device=hidden.device)
        total, picked = torch.zeros_like(high), torch.zeros_like(high)
        size = max(256, BLOCK_ELEMENTS // max(n, self._weight.shape[1]))
        for first in range(0, vocabulary, size):
            stop = min(first + size, vocabulary)
            logits = self.logits(hidden, slice(first, stop))
            index = tokens - first
            inside = (index >= 0) & (index < stop - first)
            value = logits.gather(1, index.clamp(0, stop - first - 1)[:, None])[:, 0]
            picked = torch.where(inside, value, picked)
            top = torch.maximum(high, logits.amax(1))
            total = total * (high - top).exp() + logits.sub_(top[:, None]).exp_().sum(1)
            high = top
        return high + total.log() - picked
