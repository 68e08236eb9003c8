"""Convex heads: a linear classifier of cached features, by logistic regression or ridge regression, without a learning rate.

With features x of n rows, right classes y and scores s(x) = offset(x) + W x + b, in units z = (x - mean) / (deviation sqrt(D)),
where |z|^2 is 1 on average, and V = W deviation sqrt(D):

    logistic  min  1/n sum_i -log softmax(s(x_i))[y_i] + penalty/2 |V|^2        L-BFGS in float64
    ridge     min  1/n sum_i |onehot(y_i) - V z_i - b|^2 / 2 + penalty/2 |V|^2  Cholesky; scores are then t (V z + b)

The columns that are read (a layer, or all), the penalty and t are those with the least loss on rows held out of the given
ones; the result is then fitted on all of them. More columns than rows are first rotated into the rows' own coordinates, which
changes no optimum. Memory over the features: three n x n matrices in float64, or n x D where D < n. Without an intercept
nothing is centred. It does not: weigh classes, see a test row, use a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

How = Literal["logistic", "ridge"]

PENALTIES = tuple(10.0**-k for k in range(7))  # chosen: from strong to weak, so that each solution starts the next
_SHARPER = tuple(2.0**k for k in range(7))  # t: ridge scores lie between 0 and 1, which as logits are too flat; chosen
_COLUMNS = 1024  # columns that are converted to float64 at a time
_ENOUGH = 1.1  # held-out loss over the least of its columns at which weaker penalties are not tried: they only get slower
_ITERATIONS = 200  # of L-BFGS; it ends earlier where the gradient does


@dataclass(frozen=True)
class Fitted:
    """A fitted head, float32: scores = X @ weight.T + bias, besides the offset."""

    weight: Tensor  # [C, D], zero in columns that were not chosen
    bias: Tensor | None  # [C]
    block: str  # the columns that were chosen
    penalty: float
    loss: float  # nats a row, on the rows that were held out
    accuracy: float


class _Rows(NamedTuple):
    """Features in the coordinates of a solver, and how a solution in them becomes one of the features."""

    R: Tensor  # [n, r] float64
    back: Callable[[Tensor], Tensor]  # V [r, C] -> [D, C]
    mean: Tensor  # [D]


def fit(
    X: Tensor,
    y: Tensor,
    classes: int,
    held: Tensor,
    blocks: Mapping[str, slice],
    *,
    how: How = "logistic",
    offset: Tensor | None = None,
    intercept: bool = True,
) -> Fitted:
    """Fit a head on the CPU. X [n, D], y [n] in 0..classes-1, held [n] bool: rows that choose, among them neither all nor
    none; blocks: sets of columns to choose from, the first of equal ones; offset [n, classes]: scores that are there already.
    """
    shift = torch.zeros(len(X), classes, dtype=torch.float64) if offset is None else offset.double()
    best: tuple[float, float, str, float, float] | None = None  # loss, accuracy, block, penalty, t
    for name, columns in blocks.items():
        rows = _rows(X[:, columns], ~held, intercept)
        start, least = None, float("inf")
        for penalty in PENALTIES:
            start = _solve(rows.R[~held], y[~held], classes, penalty, how, shift[~held], intercept, start)
            raw = rows.R[held] @ start[:-1] + start[-1]
            for t in _SHARPER if how == "ridge" else (1.0,):
                scores = shift[held] + t * raw
                loss = float(F.cross_entropy(scores, y[held]))
                least = min(least, loss)
                if best is None or loss < best[0]:
                    accuracy = float((scores.argmax(1) == y[held]).double().mean())
                    best = (loss, accuracy, name, penalty, t)
            if how == "logistic" and loss > _ENOUGH * least:
                break
    assert best is not None, "no columns to choose from, or no finite loss"
    loss, accuracy, name, penalty, t = best
    rows = _rows(X[:, blocks[name]], torch.ones(len(X), dtype=torch.bool), intercept)
    V = t * _solve(rows.R, y, classes, penalty, how, shift, intercept, None)
    W = rows.back(V[:-1])
    weight = torch.zeros(classes, X.shape[1])
    weight[:, blocks[name]] = W.T.float()
    bias = (V[-1] - rows.mean @ W).float() if intercept else None
    return Fitted(weight, bias, name, penalty, loss, accuracy)


def _rows(X: Tensor, known: Tensor, intercept: bool) -> _Rows:
    """X in units of its `known` rows; rotated into as many coordinates as it has rows where it has more columns."""
    n, D = X.shape
    mean, scale = torch.zeros(D, dtype=torch.float64), torch.empty(D, dtype=torch.float64)
    parts = [slice(first, min(first + _COLUMNS, D)) for first in range(0, D, _COLUMNS)]
    for part in parts:
        x = X[known, part].double()
        if intercept:
            mean[part] = x.mean(0)
        scale[part] = (x - mean[part]).square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0) * D**0.5

    def z(part: slice) -> Tensor:
        return (X[:, part].double() - mean[part]) / scale[part]

    if n >= D:
        return _Rows(torch.cat([z(part) for part in parts], 1), lambda V: V / scale[:, None], mean)
    K = torch.zeros(n, n, dtype=torch.float64)
    for part in parts:
        Z = z(part)
        K.addmm_(Z, Z.T)
    S, U = torch.linalg.eigh(K)
    kept = S[-1] * 1e-12 < S  # what lies below is rounding
    S, U = S[kept].sqrt(), U[:, kept]

    def back(V: Tensor) -> Tensor:
        A = U @ (V / S[:, None])
        return torch.cat([z(part).T @ A for part in parts]) / scale[:, None]

    return _Rows(U * S, back, mean)


def _solve(
    R: Tensor, y: Tensor, classes: int, penalty: float, how: How, offset: Tensor, intercept: bool, start: Tensor | None
) -> Tensor:
    """The minimum [r + 1, C]; its last row is the intercept, zero where there is none."""
    if how == "ridge":
        return _ridge(R, F.one_hot(y, classes).double() - offset, penalty, intercept)
    V = torch.zeros(R.shape[1] + 1, classes, dtype=torch.float64) if start is None else start.clone()
    V.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [V], max_iter=_ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        scores = offset + R @ V[:-1] + (V[-1] if intercept else 0.0)
        value = F.cross_entropy(scores, y) + penalty / 2 * V[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[arg-type]
    return V.detach()


def _ridge(R: Tensor, Y: Tensor, penalty: float, intercept: bool) -> Tensor:
    zero = torch.zeros(1, dtype=torch.float64)
    middle, height = (R.mean(0), Y.mean(0)) if intercept else (zero.expand(R.shape[1]), zero.expand(Y.shape[1]))
    R, Y = R - middle, Y - height
    normal = R.T @ R / len(R) + penalty * torch.eye(R.shape[1], dtype=torch.float64)
    V = torch.cholesky_solve(R.T @ Y / len(R), torch.linalg.cholesky(normal))
    return torch.cat([V, (height - middle @ V)[None]])
