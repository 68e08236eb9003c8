"""Node perturbation: noise on the outputs of layers, one vector for each example, credited to biases or to weights.

Source: Werfel, Xie, Seung, "Learning curves for stochastic gradient descent in linear feedforward networks", 2005, for the
principle; the form is ours: an antithetic Rademacher vector for each example, shared by its tokens, in a unit for each layer.
With a_l the root mean square of layer l's output, measured in the first step, and z_n [O_l] drawn for example n:

    y_l = W_l x + b_l +- eps a_l z_n;  c_n = (l_n+ - l_n-) / (2 eps);  G_l = 1/N sum_n c_n / s * z_n   (s: see `_examples`)
    M_l <- b M_l + (1 - b) G_l;  b_l <- b_l - lr * a_l * M_l                                            (b: `momentum`)

credit: vectors. Noise on an output is a displaced bias, so it costs no product with weights, and the step is that of
per-example probes of the biases alone. Every tuned vector takes part: biases of linear layers and of normalisations, and the
weights of normalisations, whose noise is in proportion to what they scale; a model without biases (LLaMA) has only those.
Matrices stay as they are, also a fresh head, which scheme readout starts. lr is about sqrt(N) times the change of an output,
relative to its size, in one step.

credit: weights. The weights of linear layers move instead, but the output head's, by the outer product of the same noise with
the inputs x_nt of the layer, summed over the tokens of example n (padding left out, mean of the two forwards):

    G_l = 1/N sum_n c_n / s * z_n (sum_t x_nt)^T;  M_l <- b M_l + (1 - b) G_l;  W_l <- W_l - lr * M_l / rms(M_l)

so lr is the change of a weight in one step. That the tokens share one vector makes the sum stand for their inputs, which holds
as far as these look alike. It holds N x D floats a layer during a step. They determine the step and are too many for a
journal: a run resumes from checkpoints and cannot be replayed. Layers without bias take part; biases and norms stay.

Cost: 2q forwards (weights: q = 1), one more in the first step. State: M, 4 bytes an entry of what moves, none for weights with
momentum 0. The journal of vectors holds 2q N numbers a step. It does not: decay anything, measure a_l again. A layer whose
output is zero or is not known (the head's, any closure's) counts as large as the others are on the whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smidgen import noise
from smidgen.config import ConfigError
from smidgen.directions import Dense
from smidgen.inputs import is_linear
from smidgen.objective import Objective
from smidgen.optim._examples import estimate, relative
from smidgen.optim._optimizer import MethodConfig, Optimizer, Outcome
from smidgen.optim._values import Estimate
from smidgen.params import Entry, ParamView, Rounding

log = logging.getLogger("smidgen")

status = "experimental"

# eps: the prototype's 5 % of an output. lr: a tenth of the best of a small trial on the embedded model (docs/decisions.md).
SUGGESTED = {scheme: {"lr": 1e-2, "eps": 0.05} for scheme in ("full", "bitfit", "head")}


class Config(MethodConfig):
    """Options of node perturbation."""

    lr: float = Field(
        1e-3,
        gt=0,
        description="learning rate: sqrt(examples) times the relative change of an output in a step; of weights, their change",
    )
    eps: float = Field(0.05, gt=0, description="size of the noise, in units of the root mean square of an output")
    queries: int = Field(1, ge=1, description="vectors of each example, q; 1 where weights are credited")
    credit: Literal["vectors", "weights"] = Field(
        "vectors", description="what moves: biases and norms, or the weights of linear layers, which leaves no journal"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="b, the share of M that is kept in a step")
    rounding: Rounding = Field("stochastic", description="rounding of updates to 16-bit biases")
    seed: int = Field(0, ge=0, description="run seed: addresses all noise")

    @model_validator(mode="after")
    def _one_vector(self) -> Config:
        if self.credit == "weights" and self.queries > 1:
            raise ValueError(
                f"queries = {self.queries} with credit = weights: weights take one vector an example, set queries to 1"
            )
        return self


@dataclass(frozen=True)
class OnOutputs:
    """A direction over vectors, z[name] = a * signs: noise on the outputs of layers in their own units."""

    dense: Dense
    units: Mapping[str, float]
    query: int

    @property
    def support(self) -> frozenset[str]:
        """The vectors that take part."""
        return frozenset(self.units)

    def _signs(self) -> Dense:
        d = self.dense
        return Dense(d.seed, d.step, self.query, d.ids, d.distribution)

    def displaced(self, name: str, weight: Tensor, scale: float, out: Tensor, *, first: int = 0) -> None:
        self._signs().displaced(name, weight, scale * self.units[name], out, first=first)

    def displaced_rows(self, name: str, weight: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
        self._signs().displaced_rows(name, weight, rows, scale * self.units[name], out)

    def accumulate(self, name: str, rows: slice, out32: Tensor, scale: float) -> None:
        self._signs().accumulate(name, rows, out32, scale * self.units[name])

    def factors(self, name: str) -> None:
        return None


class Node(Optimizer):
    """Node perturbation over the vectors, or the linear weights, among any tensors. Raises ConfigError where there are none."""

    uses: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __init__(self, params: ParamView | Iterable[Any], config: Config | None = None, **options: Any):
        super().__init__(params, config or Config(**options))
        self.units: dict[str, float] = {}  # a of each tensor
        self.begun = False  # whether M holds a step
        self.moved = [e.name for e in self.view if self.moves(e.name)]
        left = len(self.view) - len(self.moved)
        if not self.moved and self.config.credit == "weights":
            raise ConfigError(
                f"node with credit = weights moves the weights of linear layers, and none of the {left} tuned tensors is one: "
                "take scheme full, or credit vectors"
            )
        if not self.moved:
            raise ConfigError(
                f"node credits biases and weights of normalisations, and none of the {left} tuned tensors is one: take scheme "
                "full or bitfit (scheme_args.norms=true for a model without biases), or method grzo"
            )
        if left and self.config.credit == "vectors":
            log.warning("node moves %d biases and weights of normalisations; %d matrices stay", len(self.moved), left)
        elif left:
            log.warning("node moves the weights of %d linear layers; %d other tensors stay", len(self.moved), left)

    def moves(self, name: str) -> bool:
        entry = self.view[name]
        if self.config.credit == "weights":
            return is_linear(entry, None) and entry.support is None
        return entry.tensor.ndim <= 1 and entry.support is None

    @classmethod
    def replayable(cls, config: Config) -> bool:
        """Weights are credited by the inputs of layers, which are too many numbers for a journal."""
        return config.credit == "vectors"

    def _step(self, objective: Objective) -> Outcome:
        cfg = self.config
        if not self.units and not self._measure(objective):
            return Outcome(loss=math.nan, written=False, voided=cfg.queries)
        if cfg.credit == "weights":
            return self._credit_weights(objective)
        Z = [Dense(cfg.seed, self.t, i, self.view.ids) for i in range(cfg.queries)]
        g = estimate(objective, Z, [OnOutputs(z, self.units, z.query) for z in Z], (), cfg.eps)
        return self._credit(g, self.units, self._move)

    def _credit_weights(self, objective: Objective) -> Outcome:
        cfg = self.config
        L, inputs = objective.perturbed(self.moved, self._noise)
        rows = L.shape[1]
        Z = [Dense(cfg.seed, self.t, n, self.view.ids) for n in range(rows)]
        g = Estimate.of(Z, (L[0] - L[1]) / (2 * cfg.eps), L.mean(0), None)

        def turn(name: str, step: Estimate, lr: float, kept: float) -> None:
            self._turn(name, step, inputs[name], rows, lr, kept)

        return self._credit(g, inputs, turn)

    def _credit(self, g: Estimate, credited: Container[str], move: Callable[[str, Estimate, float, float], None]) -> Outcome:
        """Move the credited tensors along an estimate. move: of (name, step, rate, share of the last step kept)."""
        if g.dead:
            return g.outcome()
        step, spread = relative(g)
        kept = self.config.momentum if self.begun else 0.0
        for group in self.param_groups:
            for name in self.names_of(group):
                if name in credited:
                    move(name, step, group["lr"], kept)
        self.begun = True
        return g.outcome(**{"zo/spread": spread})

    def _noise(self, name: str, row: int, rows: int) -> Tensor:
        """eps a z of one example, on the outputs of a linear layer."""
        entry = self.view[name]
        out = torch.zeros(entry.tensor.shape[0 if _stored(entry) else 1], device=entry.tensor.device)
        z = Dense(self.config.seed, self.t, row, self.view.ids)
        z.accumulate(name, slice(0, len(out)), out[:, None], self.config.eps * self.units[name])
        return out

    def _turn(self, name: str, g: Estimate, X: Tensor, rows: int, lr: float, kept: float) -> None:
        """One linear weight's step, from the token-summed inputs X [N, D] of its layer."""
        entry, live = self.view[name], [z.query for z in g.Z]
        V = torch.stack([self._noise(name, n, rows) for n in live])
        c = torch.tensor(g.c, device=V.device) / len(live)
        G = (V * c[:, None]).T @ X[live]
        if not _stored(entry):
            G = G.T
        M = G
        if self.config.momentum:
            state = self.state[entry.tensor]
            M = state.setdefault("momentum_buffer", torch.zeros_like(G)).mul_(kept).add_(G, alpha=1.0 - kept)
        size = float(M.square().mean().sqrt())
        if size == 0.0:
            return

        def descend(w: Tensor) -> None:
            w.add_(M, alpha=-lr / size)

        self.view.edit_(name, descend, at=self.rounding_address(self.config.seed), rounding=self.config.rounding)

    def _measure(self, objective: Objective) -> bool:
        """Find the unit of each vector; False where outputs are not finite. Cost: one forward."""
        found = objective.output_sizes(self.moved)
        known = [a for a in found.values() if a > 0.0]
        usual = math.sqrt(sum(a * a for a in known) / len(known)) if known else 1.0
        if not math.isfinite(usual) or any(math.isnan(a) for a in found.values()):
            return False
        self.units = {name: a if a > 0.0 else usual for name, a in found.items()}
        return True

    def _move(self, name: str, g: Estimate, lr: float, kept: float) -> None:
        entry, at = self.view[name], self.rounding_address(self.config.seed)
        state = self.state[entry.tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros(entry.tensor.shape, dtype=torch.float32, device=entry.tensor.device)
        M, rate = state["momentum_buffer"], lr * self.units[name]
        noise.update_(M, g.terms(name, 1.0 - kept), g.Z[0].distribution, decay=kept, at=at)

        def descend(w: Tensor) -> None:
            w.add_(M, alpha=-rate)

        self.view.edit_(name, descend, at=at, rounding=self.config.rounding)

    def _scalars(self) -> dict[str, Any]:
        return {"units": dict(self.units), "begun": self.begun}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self.units, self.begun = dict(scalars["units"]), scalars["begun"]

    @staticmethod
    def state_bytes(shapes: Mapping[str, Any], config: Config) -> int:
        """M, float32. Of weights at most: which matrices are linear layers, shapes do not say."""
        axes = (2,) if config.credit == "weights" else (0, 1)
        held = [shape for shape, _ in shapes.values() if len(shape) in axes and not hasattr(shape, "matrix")]
        return 0 if config.credit == "weights" and not config.momentum else sum(4 * math.prod(shape) for shape in held)


def _stored(entry: Entry) -> bool:
    """Whether a linear weight is stored as [outputs, inputs]; Conv1D's is not."""
    return not entry.sites or isinstance(entry.sites[0][0], nn.Linear)


build = Node
