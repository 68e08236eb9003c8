"""How large the outputs of modules are: for tensors that displace an output, the root mean square of that output at theta.

Of a bias, or a weight of a normalisation, it is the output of the module that owns it, over all positions of the data, padding
included: it serves as a unit of length. Cost: one forward a micro-batch. Theta is not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.probing import Batch, Engine


def output_squares(engine: Engine, batches: Sequence[Batch], names: Sequence[str]) -> Tensor:
    """(sum of squares, count) of the outputs of each tensor's module, float64 [names, 2]: what ranks exchange. Zeros for a
    module whose output is no tensor, or that is not run (the output head, which is applied at labels only)."""
    for batch in batches:
        engine.prepare(batch)  # the self-check's own evaluations would be counted
    totals = torch.zeros(len(names), 2, dtype=torch.float64)
    handles = []
    try:
        for at, name in enumerate(names):
            module = engine.view[name].sites[0][0]
            handles.append(module.register_forward_hook(functools.partial(_count, totals[at])))
        for batch in batches:
            engine.losses(batch)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def _count(total: Tensor, _: nn.Module, __: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        total += torch.tensor([float(output.detach().float().square().sum(dtype=torch.float64)), output.numel()])


def sizes(squares: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Root mean squares by name from `output_squares`, added up over ranks; 0 where nothing was counted."""
    return dict(zip(names, (squares[:, 0] / squares[:, 1].clamp(min=1.0)).sqrt().tolist(), strict=True))
