"""Schemes whose tuned positions move, inside a trainer: a word after each step, and checkpoints of their own.

The mixin stands before `ForwardOnlyMixin`. A checkpoint holds what the scheme saves of itself instead of the whole model,
whose frozen weights are in the base already.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from smidgen.adapt._adapted import Moving, Resting

__all__ = ["Moving", "MovingMixin"]


class MovingMixin:
    """Extra argument of a trainer: `moving`, the scheme, or None for one that stays where it is."""

    def __init__(self, *args: Any, moving: Moving | None = None, **kwargs: Any):
        self.moving = moving
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's optimizer, known to the scheme."""
        new = self.optimizer is None  # type: ignore[attr-defined]
        super().create_optimizer(model)  # type: ignore[misc]
        if new and self.moving is not None:
            self.moving.begin(self.stepper)  # type: ignore[attr-defined]
        return self.optimizer  # type: ignore[attr-defined]

    def resting(self) -> AbstractContextManager[None]:
        """Inside this context the scheme is what is evaluated."""
        return self.moving.resting() if isinstance(self.moving, Resting) else nullcontext()

    def _one_step(self, *args: Any) -> float:
        loss = super()._one_step(*args)  # type: ignore[misc]
        if self.moving is not None:
            self.moving.after_step(self.stepper, self.state.max_steps)  # type: ignore[attr-defined]
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.moving is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        self.moving.save_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.moving is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            self.moving.load_state(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.moving is None:
            super()._load_best_model()  # type: ignore[misc]
        else:
            self.moving.load_state(Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]
