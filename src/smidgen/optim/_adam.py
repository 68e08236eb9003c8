"""Adam's arithmetic on blocks, for methods that make their gradient from loss values and never hold it whole.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr * m_hat / (sqrt(v_hat) + eps)

with m_hat = m / (1 - b1^n), v_hat = v / (1 - b2^n) after n updates, as torch.optim.Adam. In 8 bits the root of v is
stored: its range is half as many decades as that of v, so small entries do not become zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smidgen import noise
from smidgen.optim import _eight_bit as memory
from smidgen.optim._eight_bit import State
from smidgen.optim._values import Estimate, ValueOptimizer
from smidgen.params import ParamView

_UNUSED = noise.Address(0, 0, 0, 0, noise.ROUND)  # state is not rounded stochastically


@dataclass
class Adam:
    """The rule and its scalar state. `begin` once an update, then `move` for every block of every tensor.

    `uniform`: all entries of g have one magnitude (one Rademacher direction: g = c z, g^2 = c^2), so v is a number, not a
    tensor: `begin` takes c^2 and `move_along` the direction, without forming g.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    v_max: bool = False
    eight_bit: bool = False
    uniform: bool = False
    count: int = 0  # updates made, n
    v: float = 0.0  # of uniform
    top: float = 0.0  # largest v so far, of uniform with v_max

    def begin(self, square: float = 0.0) -> None:
        """The next update begins; `square` is c^2 of a uniform one."""
        self.count += 1
        self.v = self.beta2 * self.v + (1.0 - self.beta2) * square
        self.top = max(self.top, self.v)

    def moments(self, states: MutableMapping[Tensor, State], tensor: Tensor) -> State:
        """The state of a tensor; moments of zero at first."""
        state = states[tensor]
        for key in () if state else self._keys():
            memory.allocate(state, key, tensor, self.eight_bit)
        return state

    def _keys(self) -> list[str]:
        if self.uniform:
            return ["exp_avg"]
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.v_max else [])]

    def move(self, state: State, span: slice, g: Tensor, w: Tensor, lr: float) -> None:
        """One block; `g` is used as scratch."""
        m = memory.read(state, "exp_avg", span, signed=True)
        m.lerp_(g, 1.0 - self.beta1)
        memory.write(state, "exp_avg", span, m, signed=True)
        v = self._read_square(state, "exp_avg_sq", span)
        v.mul_(self.beta2).addcmul_(g, g, value=1.0 - self.beta2)
        root = torch.sqrt(v, out=g)
        self._write_root(state, "exp_avg_sq", span, root)
        if self.v_max:
            top = self._read_square(state, "max_exp_avg_sq", span)
            root = torch.sqrt(torch.maximum(top, v, out=top), out=g)
            self._write_root(state, "max_exp_avg_sq", span, root)
        step, eps = self._corrected(lr)
        w.addcdiv_(m, root.add_(eps), value=-step)

    def move_along(
        self, state: State, span: slice, terms: Sequence[noise.Term], distribution: noise.Distribution, w: Tensor, lr: float
    ) -> None:
        """One block of a uniform update; `terms` are (1 - b1) g."""
        m = memory.read(state, "exp_avg", span, signed=True)
        noise.update_(m, terms, distribution, decay=self.beta1, at=_UNUSED, start=span.start)
        memory.write(state, "exp_avg", span, m, signed=True)
        step, eps = self._corrected(lr)
        w.add_(m, alpha=-step / (math.sqrt(self.top if self.v_max else self.v) + eps))

    def _corrected(self, lr: float) -> tuple[float, float]:
        """(step, eps') with lr m_hat / (sqrt(v_hat) + eps) = step m / (sqrt(v) + eps')."""
        root = math.sqrt(1.0 - self.beta2**self.count)
        return lr * root / (1.0 - self.beta1**self.count), self.eps * root

    def _read_square(self, state: State, key: str, span: slice) -> Tensor:
        value = memory.read(state, key, span, signed=False)
        return value.square_() if state[key].dtype == torch.uint8 else value

    def _write_root(self, state: State, key: str, span: slice, root: Tensor) -> None:
        memory.write(state, key, span, root, signed=False)

    def scalars(self) -> dict[str, Any]:
        """For `state_dict`."""
        return {"count": self.count, "v": self.v, "top": self.top}

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Put `scalars` back."""
        self.count, self.v, self.top = scalars["count"], scalars["v"], scalars["top"]

    def state_bytes(self, shapes: Mapping[str, Any]) -> int:
        """Bytes of the moments."""
        return len(self._keys()) * sum(memory.nbytes(shape, self.eight_bit) for shape, _ in shapes.values())


class AdamOptimizer(ValueOptimizer):
    """A method from loss values that holds Adam's state, always or with one of its options."""

    def __init__(self, params: ParamView | Iterable[Any], config: Any, adam: Adam):
        super().__init__(params, config)
        self.adam = adam

    def _adam_(self, g: Estimate, name: str, lr: float, span: slice, w: Tensor, work: Tensor) -> None:
        """One block of Adam's step for an estimate; `work` is scratch."""
        g.add_(name, span.start, work.zero_())
        self._feed_(work, name, lr, span, w)

    def _feed_(self, g: Tensor, name: str, lr: float, span: slice, w: Tensor) -> None:
        """One block of Adam's step for a gradient, which is used as scratch."""
        self.adam.move(self.adam.moments(self.state, self.view[name].tensor), span, g, w, lr)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "adam": self.adam.scalars()}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        super()._load_scalars(scalars)
        self.adam.load(scalars["adam"])
