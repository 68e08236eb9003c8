"""What every optimizer here shares: tensors under names, a step counter, an outcome, a state that keeps its dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from smidgen import noise
from smidgen.activations._compressed import drop
from smidgen.directions import Probe
from smidgen.objective import Objective, as_objective
from smidgen.params import ParamView


class MethodConfig(BaseModel):
    """Options of a method; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def steps(self) -> int | None:
        """Steps that a budget of the method's own pays for; None where it has none."""
        return None


@dataclass(frozen=True)
class Outcome:
    """What one step did."""

    loss: float  # mean loss of the step's data, nats; NaN for a bad step
    written: bool  # False for a bad step: no weight changed
    voided: int = 0  # units (pairs, candidates, blocks) dropped for non-finite values
    measures: Mapping[str, float] | None = None  # for the log, e.g. {"zo/projected_grad": 0.3}


class Optimizer(torch.optim.Optimizer):
    """Base of all methods. Subclasses write `_step(objective) -> Outcome`.

    `params` is a ParamView, an iterable of tensors, or torch's parameter groups. `step(objective)` makes one estimate
    and update; `step(closure)` does the same with any loss function of no arguments; `step()` without argument does
    nothing, since `transformers.Trainer` calls it once more after the step has been made.
    """

    uses: ClassVar[frozenset[str]]
    lazy: ClassVar[bool] = False  # whether it may hold an offset between steps
    compressed: ClassVar[bool] = (
        False  # whether it works on compressed gradients as they are, so that its state has their shape
    )
    linear: ClassVar[bool] = True  # whether an update is a sum of the directions that it probed

    def __init__(self, params: ParamView | Iterable[Any], config: Any):
        groups: list[dict[str, Any]]
        if isinstance(params, ParamView):
            self.view = params
            groups = [{"params": [e.tensor for e in params]}]
        else:
            listed = list(params)
            groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
            groups = [{**g, "params": list(g["params"])} for g in groups]
            self.view = ParamView.of_tensors(t for g in groups for t in g["params"])
        self.config = config
        self.t = 0  # steps made, bad ones included
        self.outcome: Outcome | None = None
        self.bad_steps = 0  # bad steps in a row
        self.spent: dict[str, int] = {}  # what the steps cost so far (forwards, ...), kept here by the trainer
        super().__init__(groups, {"lr": config.lr})

    @classmethod
    def replayable(cls, config: Any) -> bool:
        """Whether the losses of a step determine it, so that a journal of them is the run."""
        return "backward" not in cls.uses

    # -- to be written by a method ------------------------------------------------------------------------------------

    def _step(self, objective: Objective) -> Outcome:
        raise NotImplementedError

    def offset(self) -> Probe:
        """The part of theta that is not yet written into the weights: theta = weights + offset."""
        return ()

    def merge_(self) -> None:
        """Write the offset into the weights, at the end of a run. Theta stays what it is, up to one rounding."""

    def moves(self, name: str) -> bool:
        """Whether the method changes a tensor at all."""
        return True

    def _scalars(self) -> dict[str, Any]:
        """Scalar state beyond the step counter, for `state_dict`."""
        return {}

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        """Put `_scalars` back."""

    # -- shared -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Objective | Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss, NaN for a bad step."""
        if closure is None:
            return None
        self.outcome = self._step(as_objective(closure, self.view))
        self.bad_steps = 0 if self.outcome.written else self.bad_steps + 1
        self.t += 1
        return self.outcome.loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and lets go of gradients in compressed form."""
        super().zero_grad(set_to_none)
        drop(e.tensor for e in self.view)

    def names_of(self, group: dict[str, Any]) -> list[str]:
        """Names of a group's tensors."""
        by_id = {id(e.tensor): e.name for e in self.view}
        return [by_id[id(p)] for p in group["params"]]

    def decay(self, group: dict[str, Any], weight_decay: float) -> dict[str, float] | float:
        """Factors 1 - lr * weight_decay of the tensors that decay: those with two axes or more, as in MeZO."""
        if weight_decay == 0.0:
            return 1.0
        factor = 1.0 - group["lr"] * weight_decay
        return {n: factor if self.view[n].tensor.ndim >= 2 else 1.0 for n in self.names_of(group)}

    def rounding_address(self, seed: int, write: int = 0) -> noise.Address:
        """Where the rounding bits of one of this step's writes live; the view fills in the tensor."""
        return noise.Address(seed, 0, self.t, write, noise.ROUND)

    def state_dict(self) -> dict[str, Any]:
        """torch's state plus the step counter and the method's scalars."""
        return {
            **super().state_dict(),
            "smidgen": {**self._scalars(), "t": self.t, "bad_steps": self.bad_steps, "spent": dict(self.spent)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but tensors of the state keep their own dtype (float32 moments of 16-bit weights)."""
        scalars = dict(state_dict["smidgen"])
        dtypes = [{k: v.dtype for k, v in s.items() if isinstance(v, Tensor)} for s in state_dict["state"].values()]
        originals = list(state_dict["state"].values())
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "smidgen"})
        for state, kinds, original in zip(self.state.values(), dtypes, originals, strict=True):
            for key, dtype in kinds.items():
                if state[key].dtype != dtype:
                    state[key] = original[key].to(device=state[key].device)
        self.t, self.bad_steps, self.spent = (scalars.pop(key) for key in ("t", "bad_steps", "spent"))
        self._load_scalars(scalars)
