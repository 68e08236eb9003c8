"""An addend: what training adds to a weight that cannot be written, a growing sum of products A B^T.

A quantised weight has no place for a small change: its codes stay as they are for good. Theta is then W + A B^T, with A [m, R]
and B [n, R] in float32, and the layer's output gets two thin products after its own:

    y = layer(x) + (x B) A^T

Every write adds columns, R grows by the rank of what is written, up to the smaller side of the matrix, where the product is
formed and factored again through the identity (exact up to float32 rounding). Bytes: 4 R (m + n).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smidgen.config import ConfigError
from smidgen.directions import Probe


class Addend:
    """The addend of one linear layer with a weight [m, n]; its forward includes it from now on."""

    def __init__(self, module: nn.Module, shape: tuple[int, int], device: torch.device):
        self.shape = shape
        self.left = torch.zeros(shape[0], 0, device=device)  # A [m, R]
        self.right = torch.zeros(shape[1], 0, device=device)  # B [n, R]
        module.register_forward_hook(self._after)

    @property
    def rank(self) -> int:
        """R, the columns so far."""
        return self.left.shape[1]

    def nbytes(self) -> int:
        """Bytes held."""
        return self.left.nbytes + self.right.nbytes

    def stand_in(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the weight's shape without storage of that size: NaN everywhere, and it cannot be written."""
        return torch.full((), torch.nan, dtype=dtype, device=self.left.device).expand(self.shape)

    def take_(self, name: str, probe: Probe, decay: float) -> None:
        """A B^T += sum(scale * z[name]), terms of zero left out. Raises ConfigError for directions without factors and for
        decay."""
        if decay != 1.0:
            raise ConfigError(f"{name} is quantised and cannot decay: set weight_decay to 0")
        for z, scale in probe:
            pair = z.factors(name)
            if pair is None:
                raise refusal(name)
            if not pair[0].any():  # a refresh has just been made
                continue
            self.set(torch.cat([self.left, scale * pair[0]], 1), torch.cat([self.right, pair[1]], 1))

    def set(self, left: Tensor, right: Tensor) -> None:
        """Replace A and B."""
        m, n = self.shape
        assert left.shape[0] == m and right.shape[0] == n and left.shape[1] == right.shape[1]
        if left.shape[1] > min(m, n):
            whole = left @ right.T
            unit = torch.eye(min(m, n), device=whole.device)
            left, right = (whole, unit) if n <= m else (unit, whole.T)
        self.left, self.right = left.contiguous(), right.contiguous()

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if not self.rank:
            return None
        x = args[0].reshape(-1, self.shape[1])
        inner, A = x @ self.right.to(x.dtype), self.left.to(x.dtype)
        flat = out.reshape(-1, self.shape[0])
        if torch.is_grad_enabled():
            return torch.addmm(flat, inner, A.T).view(out.shape)
        return flat.addmm_(inner, A.T).view(out.shape)


def refusal(name: str) -> ConfigError:
    """What is said where something would write a quantised weight itself."""
    return ConfigError(
        f"{name} is quantised and cannot be written: take a method with low-rank steps (lozo, fzoo, es), or tune an adapter "
        "(--scheme lora)"
    )
