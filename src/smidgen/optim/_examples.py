"""Shared by methods that give every example its own direction: the estimate from N examples and q `queries`.

    l_n+- = l_n(theta +- eps z_n), the loss of example n alone;  c_n = (l_n+ - l_n-) / (2 eps)
    g_hat = 1/(N q) sum_n c_n / s * z_n,  s^2 = mean of the c_n^2 of the step

Only example n is evaluated at +- z_n, so two forwards carry N directions. Over independent z_n, E[c_n z_n] is the gradient of
l_n: their mean estimates the gradient of the mean over examples, each of which weighs the same, however many labels it has.
Dividing by s makes the length of a step independent of the scale of the loss and of eps. (The mean of the c_n is noise, so s is
about their standard deviation; about zero it is also there for one example, whose step then has length one.)

An example without a finite loss voids its own unit only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from smidgen.directions import Dense, Probe
from smidgen.objective import Objective
from smidgen.optim._values import Estimate
from smidgen.per_example import Each


def estimate(objective: Objective, Z: Sequence[Dense], shaped: Sequence[Any], offset: Probe, eps: float) -> Estimate:
    """The estimate along the families `shaped`, which stand at the addresses of Z. Cost: 2 forwards a family."""
    probes = [(*offset, (Each(z), s * eps)) for z in shaped for s in (1, -1)]
    L = objective.losses(probes, each=True)
    examples = L.shape[1]
    L = L.view(len(Z), 2, examples)
    own = [replace(z, query=z.query * examples + n) for z in Z for n in range(examples)]
    return Estimate.of(own, ((L[:, 0] - L[:, 1]) / (2 * eps)).flatten(), L.mean(1).flatten(), None)


def relative(g: Estimate) -> tuple[Estimate, float]:
    """The estimate with each c divided by their root mean square, and that."""
    rms = (sum(c * c for c in g.c) / len(g.c)) ** 0.5
    return replace(g, c=tuple(c / rms if rms > 0.0 else 0.0 for c in g.c)), rms
