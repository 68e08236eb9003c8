"""Convex heads: they are the minimum that they say, whatever the coordinates, and choose by held-out rows alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from smidgen import convex


def rows(n, D, C, seed=0, noise=1.0):
    """Features whose first four columns know the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=generator)
    X = torch.randn(n, D, generator=generator) * torch.linspace(0.5, 3, D) + 7
    X[:, :4] += 5 / noise * torch.randn(C, 4, generator=generator)[y]
    return X, y, torch.arange(n) % 4 == 3


def objective(found, X, y, how, offset):
    """The value that is minimised, from the head itself and the definition of V."""
    x = X.double()
    scores = offset + x @ found.weight.T.double() + (0 if found.bias is None else found.bias.double())
    centre = x.mean(0) if found.bias is not None else torch.zeros(X.shape[1])
    V = found.weight.double() * (x - centre).square().mean(0).sqrt() * X.shape[1] ** 0.5
    squares = (F.one_hot(y).double() - scores).square().sum(1).mean() / 2
    value = squares if how == "ridge" else F.cross_entropy(scores, y)
    return float(value + found.penalty / 2 * V.square().sum())


@pytest.mark.parametrize("how", ["logistic", "ridge"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("n,D", [(61, 7), (30, 95)])
def test_it_is_the_minimum(n, D, intercept, how, monkeypatch):
    """No head nearby has a smaller value, with more rows than columns and with fewer (there: in rotated coordinates)."""
    monkeypatch.setattr(convex, "_SHARPER", (1.0,))
    monkeypatch.setattr(convex, "_COLUMNS", 10)
    monkeypatch.setattr(convex, "PENALTIES", (1e-2,))
    X, y, held = rows(n, D, 3)
    offset = torch.randn(n, 3, generator=torch.Generator().manual_seed(4)).double() if how == "logistic" else 0.0
    given = None if how == "ridge" else offset
    found = convex.fit(X, y, 3, held, {"all": slice(0, D)}, how=how, offset=given, intercept=intercept)
    least = objective(found, X, y, how, offset)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-2):
        for _ in range(5):
            step = found.weight.abs().mean() * size * torch.randn(found.weight.shape, generator=generator)
            other = convex.Fitted(found.weight + step, found.bias, "all", found.penalty, 0.0, 0.0)
            assert objective(other, X, y, how, offset) > least
    assert (found.bias is not None) == intercept


def test_held_out_rows_choose_the_columns_and_nothing_else_does():
    X, y, held = rows(200, 24, 2)
    blocks = {"all": slice(0, 24), "noise": slice(12, 24), "signal": slice(0, 4)}
    found = convex.fit(X, y, 2, held, blocks)
    assert found.block == "signal" and not found.weight[:, 4:].any() and found.accuracy > 0.9
    spoiled = y.clone()
    spoiled[held] = (
        1 - spoiled[held]
    )  # held rows that say the opposite: nothing that was learned helps, so the most shrunk wins
    assert convex.fit(X, spoiled, 2, held, blocks).penalty == max(convex.PENALTIES)
    again = convex.fit(X, y, 2, held, blocks)
    assert torch.equal(again.weight, found.weight) and torch.equal(again.bias, found.bias)


def test_a_class_without_rows_and_a_constant_column_do_no_harm():
    X, y, held = rows(40, 6, 2)
    X[:, 5] = 3.0
    for how in ("logistic", "ridge"):
        found = convex.fit(X, y, 3, held, {"all": slice(0, 6)}, how=how)
        assert found.weight.isfinite().all() and found.bias.isfinite().all()
        scores = X @ found.weight.T + found.bias
        assert not (scores.argmax(1) == 2).any()
