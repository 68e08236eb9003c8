"""Objectives without a gradient: minus a measure of the batch, such as accuracy or the F1 of generated answers.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333), section 3.3. The
value of a batch of B examples is -(1/B) sum_i m_i, m_i in [0, 1], so two probes often tie: c is then exactly zero and the
methods change nothing. Any function of (engine, batch, probe) can be the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from smidgen.config import ConfigError
from smidgen.directions import Direction, Probe
from smidgen.generation import Answerer, with_labels
from smidgen.loss import choice_index, targets
from smidgen.objective import ModelObjective, Sums
from smidgen.probing import Batch, Engine
from smidgen.scoring import best_of_groups, row_sums

Measure = Callable[[Engine, Batch, Probe], Tensor]  # -> [B], the higher the better


class RewardObjective:
    """Minus the mean of a measure over the examples of micro-batches; weight = examples.

    Cost of P probes: P forwards a micro-batch, or P generations, each counted as one forward and the tokens of its
    prompts. It has no gradient: `backward` and `slope` raise ConfigError.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch], measure: Measure, key: Hashable = None):
        self.engine, self.batches, self.measure, self.key = engine, batches, measure, key

    def sums(self, probes: Sequence[Probe], *, each: bool = False) -> Sums:
        """Sums and weights before division: what ranks exchange."""
        totals, weights = [], []
        for probe in probes:
            values = torch.cat([self._values(batch, probe) for batch in self.batches])
            ones = torch.ones_like(values)
            totals.append(-values if each else -values.sum())
            weights.append(ones if each else ones.sum())
        return torch.stack(totals), torch.stack(weights)

    def _values(self, batch: Batch, probe: Probe) -> Tensor:
        counts = self.engine.forwards + 1, self.engine.tokens + batch["input_ids"].numel()
        values = self.measure(self.engine, batch, probe).double().cpu()
        self.engine.forwards, self.engine.tokens = counts
        return values

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        total, weight = self.sums(probes, each=each)
        return total / weight

    def input_squares(self, names: Sequence[str]) -> dict[str, Tensor]:
        """As a ModelObjective of the same rows."""
        return ModelObjective(self.engine, [with_labels(batch) for batch in self.batches]).input_squares(names)

    def slope(self, direction: Direction) -> NoReturn:
        raise ConfigError(no_gradient("this objective"))

    def slope_sums(self, direction: Direction) -> NoReturn:
        """As `slope`: what ranks would exchange."""
        raise ConfigError(no_gradient("this objective"))

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> NoReturn:
        raise ConfigError(no_gradient("this objective"))


def no_gradient(who: str) -> str:
    """Why a method with gradients cannot minimise a metric."""
    return (
        f"{who} counts right answers and has no gradient: take a method that compares values, such as zo_sgd, or objective auto"
    )


def accuracy(engine: Engine, batch: Batch, probe: Probe = ()) -> Tensor:
    """1 for each example whose right option, or class, scores highest, else 0; NaN where a score is. Cost: one forward."""
    if "groups" in batch:
        scores, groups = -row_sums(engine, batch, probe).nll / batch["divisors"].cpu(), batch["groups"].cpu()
        best = best_of_groups(scores, groups)
        right = batch["accepted"].cpu()[best].double()
        return right.index_fill(0, groups[scores.isnan()], torch.nan)
    scores = engine.choice_scores(batch, probe)
    if engine.kind == "classification":
        golds = batch["labels"].view(-1)
    else:
        golds = choice_index(targets(batch["labels"], engine.kind).tokens, batch["choices"])
    return (scores.argmax(1) == golds).double().masked_fill(scores.isnan().any(1), torch.nan)


class AnswerMeasure:
    """What `score(text, accepted texts)` says of the generated answer of each prompt of a batch."""

    def __init__(self, answerer: Answerer, score: Callable[[str, Sequence[str]], float]):
        self.answerer, self.score = answerer, score

    def __call__(self, engine: Engine, batch: Batch, probe: Probe = ()) -> Tensor:
        texts = self.answerer(engine, batch, probe)
        values = [self.score(text, golds) for text, golds in zip(texts, batch["answers"], strict=True)]
        return torch.tensor(values, dtype=torch.float64)
