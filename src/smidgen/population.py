"""P probes in one forward: what each module adds to the product with its frozen weights.

Rows come probe by probe, P * B of them. A linear layer makes one product with W for all rows; what a probe adds is thin:

    Y_p = X_p W^T + (X_p B_p) A_p^T + b_p          W [O, D], B_p [D, r], A_p [O, r], the scale folded into A_p

Embeddings add A_p[ids] B_p^T, norms and other vectors are displaced once a probe, the output head gets the same thin
products in vocabulary blocks. A narrow matrix (a factor of LoRA, a classifier) may be displaced by dense noise, Y_p = X_p W^T
+ X_p Z_p^T. Probes may be as many as rows: every example then has its own. `smidgen.batched` decides when; nothing here
writes to a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.directions import Probe, restrict
from smidgen.linear import linear
from smidgen.loss import BLOCK_ELEMENTS
from smidgen.lowrank import Factored
from smidgen.params import Entry

PIECE = 8 << 20  # bytes of inputs and outputs of a piece of a linear layer; measured with 1 MB and 32 MB of caches


class Population:
    """The factors and vectors of P probes for one evaluation, made when a module asks for them."""

    def __init__(self, probes: Sequence[Probe]):
        self.probes = probes

    def __len__(self) -> int:
        return len(self.probes)

    def touches(self, name: str) -> bool:
        """Whether any probe displaces a tensor."""
        return any(restrict(probe, name) for probe in self.probes)

    def has_factors(self, name: str) -> bool:
        """Whether a matrix is displaced by products of factors, not by dense noise."""
        return all(isinstance(z, Factored) and z.has_factors(name) for probe in self.probes for z, _ in restrict(probe, name))

    def factors(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """(A [P, m, R], B [n, R]) with the scales folded into A; B is [P, n, R] where the probes do not share it.

        Probes share B when they draw from the same subspaces; R is then the sum of the subspaces' ranks.
        """
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
        like = next(iter(drawn.values()))
        m = like.shape[0]
        shared = sum(right.shape[1] for right in rights.values())
        own = max(sum(left.shape[1] for left in mine.values()) for mine in lefts)
        if shared <= 2 * own:  # a product for all rows costs less than one for each probe, even if half of it is with zeros
            A = like.new_zeros(len(self), m, shared)
            at = 0
            for key, right in rights.items():
                for p, mine in enumerate(lefts):
                    if key in mine:
                        A[p, :, at : at + right.shape[1]] = mine[key]
                at += right.shape[1]
            return A, torch.cat(list(rights.values()), 1)
        n = next(iter(rights.values())).shape[0]
        A = like.new_zeros(len(self), m, own)
        B = A.new_zeros(len(self), n, own)
        for p, mine in enumerate(lefts):
            at = 0
            for key, left in mine.items():
                A[p, :, at : at + left.shape[1]] = left
                B[p, :, at : at + left.shape[1]] = rights[key]
                at += left.shape[1]
        return A, B

    def deltas(self, entry: Entry) -> Tensor:
        """What the probes add to a tensor without factors, [P, *shape], float32."""
        shape, name = entry.tensor.shape, entry.name
        terms = [(p, z, scale) for p, probe in enumerate(self.probes) for z, scale in restrict(probe, name)]
        places = {key: u for u, key in enumerate(dict.fromkeys(id(z) for _, z, _ in terms))}
        Z = torch.zeros(len(places), *shape, device=entry.tensor.device)
        weights = torch.zeros(len(self), len(places))
        rows, made = slice(0, shape[0] if shape else 1), set()
        for p, z, scale in terms:
            u = places[id(z)]
            weights[p, u] += scale
            if u not in made:
                z.accumulate(name, rows, Z[u].view(rows.stop, -1), 1.0)
                made.add(u)
        return (weights.to(Z.device) @ Z.view(len(places), -1)).view(len(self), *shape)

    def vectors(self, entry: Entry) -> Tensor:
        """Displaced values of a tensor without factors, [P, *shape], in its dtype."""
        return (entry.storage + self.deltas(entry)).to(entry.tensor.dtype)


def thin(X: Tensor, A: Tensor, B: Tensor, onto: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """onto + (X B) A^T + bias for each probe, in place or into `out`. X [P * n, D], onto [P * n, O], contiguous;
    A [P, O, r], bias [P, O].

    The bias goes as one more column, so that onto is passed over once.
    """
    probes = A.shape[0]
    X = X.reshape(-1, X.shape[-1])
    flat = onto.view(probes, -1, onto.shape[-1])
    B = B.to(X.dtype)
    inner = torch.bmm(X.view(probes, -1, X.shape[1]), B) if B.ndim == 3 else (X @ B).view(probes, -1, B.shape[1])
    if bias is not None:
        inner = torch.cat([inner, inner.new_ones(1, 1, 1).expand(*inner.shape[:2], 1)], 2)
        A = torch.cat([A, bias[:, :, None]], 2)
    into = flat if out is None else out.view(flat.shape)
    return torch.baddbmm(flat, inner, A.to(X.dtype).transpose(1, 2), out=into).view(onto.shape)


class _LookedUp(Tensor):
    """An embedding matrix that gives each row of the ids the rows of its own probe."""

    table: Tensor
    A: Tensor  # [P, V, r]; without B, what is added to the matrix itself, [P, V, D]
    B: Tensor | None  # [D, r] or [P, D, r]
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
        A = torch.gather(self.A, 1, picked[:, :, None].expand(-1, -1, self.A.shape[2])).to(found.dtype)  # [P, n, r or D]
        flat = found.view(probes, -1, found.shape[-1])
        if self.B is None:
            return (flat + A).view(found.shape)
        B = self.B.expand(probes, *self.B.shape[-2:]).to(found.dtype)
        return torch.baddbmm(flat, A, B.transpose(1, 2)).view(found.shape)


class NotBatchedError(RuntimeError):
    """A tuned tensor is used in a way that has no batched form; the reason in words."""


def linear_like(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight: also layers whose weights a library holds quantised, and Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def after_linear(
    people: Population, tensors: dict[str, Entry], module: nn.Module, args: tuple[Tensor, ...], out: Tensor
) -> Tensor:
    """A forward hook: the output of a linear layer, [P * B, ..., O], with what the probes add."""
    probes, x = len(people), args[0]
    out = out.contiguous()
    bias = people.deltas(tensors["bias"]) if "bias" in tensors else None
    weight = tensors.get("weight")
    stored = isinstance(module, nn.Linear)  # as [O, D]; Conv1D stores [D, O]
    if weight is not None and people.has_factors(weight.name):
        A, B = people.factors(weight)
        if not stored:
            A, B = B.expand(probes, *B.shape[-2:]), A
        return thin(x, A, B, out, bias)
    flat = out.view(probes, -1, out.shape[-1])
    if weight is not None:
        Z = people.deltas(weight).to(x.dtype)
        X = x.reshape(probes, -1, x.shape[-1])
        flat = torch.baddbmm(flat, X, Z.transpose(1, 2) if stored else Z, out=flat)
    if bias is not None:
        flat.add_(bias[:, None])
    return out


def in_pieces(module: nn.Module, people: Population, tensors: dict[str, Entry]) -> bool:
    """Whether `piecewise` stands for a layer's forward: a plain layer with factors on a CPU, whose caches pieces stay in."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or module.weight.device.type != "cpu":
        return False
    return "weight" in tensors and people.has_factors(tensors["weight"].name)


def piecewise(module: nn.Linear, people: Population, tensors: dict[str, Entry], x: Tensor) -> Tensor:
    """The forward of a linear layer whose weight has factors: a few probes at a time, so that what the thin products read
    has just been written. Over whole outputs they are a pass over memory each (docs/decisions.md)."""
    probes, flat = len(people), x.reshape(-1, x.shape[-1])
    if len(flat) % probes:
        raise NotBatchedError(f"a linear layer gets {len(flat)} rows for {probes} probes")
    A, B = people.factors(tensors["weight"])
    bias = people.deltas(tensors["bias"]) if "bias" in tensors else None
    out = x.new_empty(len(flat), module.out_features)
    each, row = len(flat) // probes, (module.in_features + module.out_features) * x.element_size()
    pieces = min(probes, -(-len(flat) * row // PIECE))
    step = -(-probes // pieces)
    for first in range(0, probes, step):
        mine, rows = slice(first, first + step), slice(first * each, (first + step) * each)
        y = linear(flat[rows], module.weight, module.bias)
        thin(flat[rows], A[mine], B[mine] if B.ndim == 3 else B, y, None if bias is None else bias[mine], out[rows])
    return out.view(*x.shape[:-1], module.out_features)


def around_embedding(
    module: nn.Embedding, people: Population, entry: Entry, rows: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks before and after an embedding's forward: every row looks its own probe's matrix up."""
    original = module.weight

    def enter(*_: Any) -> None:
        table = torch.Tensor._make_subclass(_LookedUp, entry.storage)
        table.table, table.rows = entry.storage, rows
        table.A, table.B = people.factors(entry) if people.has_factors(entry.name) else (people.deltas(entry), None)
        module._parameters["weight"] = table  # type: ignore[assignment]

    def leave(*_: Any) -> None:
        module._parameters["weight"] = original  # type: ignore[assignment]

    return enter, leave


def layer_norm(module: nn.LayerNorm, people: Population, tensors: dict[str, Entry], x: Tensor) -> Tensor:
    """nn.LayerNorm with weights of its own for each probe: one after the other where that saves a pass over memory."""
    if x.device.type == "cpu" and x.nbytes > PIECE and not x.shape[0] % len(people):
        values = {a: people.vectors(e) for a, e in tensors.items()}
        out, each = torch.empty_like(x), x.shape[0] // len(people)
        for p in range(len(people)):
            weight, bias = (values[a][p] if a in values else getattr(module, a) for a in ("weight", "bias"))
            rows = slice(p * each, (p + 1) * each)
            out[rows] = F.layer_norm(x[rows], module.normalized_shape, weight, bias, module.eps)
        return out
    out = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    flat = out.view(len(people), -1, out.shape[-1])
    weight = people.vectors(tensors["weight"])[:, None] if "weight" in tensors else module.weight
    bias = people.vectors(tensors["bias"])[:, None] if "bias" in tensors else module.bias
    if weight is not None and bias is not None:
        return torch.addcmul(bias, flat, weight, out=flat).view(x.shape)
    if weight is not None:
        return flat.mul_(weight).view(x.shape)
    return (flat.add_(bias) if bias is not None else flat).view(x.shape)


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
    """The output head of a population. Hidden states [n, H] come probe by probe, as many of each, or `of` [n] says whose."""

    def __init__(
        self, head: nn.Linear, entry_of: Callable[[Tensor], Entry | None], people: Population, of: Tensor | None = None
    ):
        self._weight, self._bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self._people = people
        self._places = None if of is None else _even(of, len(people))
        entry = entry_of(head.weight)
        tuned = entry if entry is not None and people.touches(entry.name) else None
        factored = tuned is not None and people.has_factors(tuned.name)
        self._factors = people.factors(tuned) if tuned is not None and factored else None
        self._dense = people.deltas(tuned).transpose(1, 2) if tuned is not None and not factored else None
        entry = entry_of(head.bias) if head.bias is not None else None
        self._biases = people.deltas(entry) if entry is not None and people.touches(entry.name) else None

    def logits(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        """Logits [n, rows], float32, of some rows of the vocabulary."""
        if self._places is None:
            return self._even_logits(hidden, rows)
        places, size = self._places
        even = hidden.new_zeros(size, hidden.shape[1])
        even[places] = hidden
        return self._even_logits(even, rows)[places]

    def _even_logits(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        probes = len(self._people)
        out = linear(hidden, self._weight[rows], None if self._bias is None else self._bias[rows])
        biases = None if self._biases is None else self._biases[:, rows]
        if self._factors is not None:
            A, B = self._factors
            return thin(hidden, A[:, rows], B, out, biases).float()
        flat = out.view(probes, -1, out.shape[-1])
        if self._dense is not None:
            X = hidden.view(probes, -1, hidden.shape[1])
            flat = torch.baddbmm(flat, X, self._dense[:, :, rows].to(X.dtype), out=flat)
        if biases is not None:
            flat.add_(biases[:, None])
        return out.float()

    def nll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """-log softmax(logits)[tokens], [n], in vocabulary blocks with a running log-sum-exp."""
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


def _even(of: Tensor, probes: int) -> tuple[Tensor, int] | None:
    """Places of rows in a layout with as many for each probe, and its length; None where they have that already. `of` [n] is
    sorted."""
    counts = torch.bincount(of, minlength=probes)
    most = int(counts.max())
    if bool((counts == most).all()):
        return None
    starts = counts.cumsum(0) - counts
    return of * most + torch.arange(of.numel(), device=of.device) - starts[of], probes * most
