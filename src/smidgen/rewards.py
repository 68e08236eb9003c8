"""Objectives without a gradient: minus a measure of the batch, such as accuracy or the F1 of generated answers.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333), section 3.3. The
value of a batch of B examples is -(1/B) sum_i m_i. Where m_i is 0 or 1 two probes often tie: c is then exactly zero and the
methods change nothing. Any function of (engine, batch, probe) can be the measure, and any function of the user's of a
generated text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from smidgen.asked import per_token
from smidgen.config import ConfigError, notice
from smidgen.directions import Direction, Probe
from smidgen.generation import Answerer, with_labels
from smidgen.loss import choice_index, targets
from smidgen.objective import ModelObjective, Sums
from smidgen.perturbed import Draw
from smidgen.probing import Batch, Engine
from smidgen.reuse import Held
from smidgen.scoring import best_of_groups, row_sums
from smidgen.user_code import function

Measure = Callable[[Engine, Batch, Probe], Tensor]  # -> [B], the higher the better


class RewardObjective:
    """Minus the mean of a measure over the examples of micro-batches; weight = examples.

    Cost of P probes: P forwards a micro-batch, or P generations, each counted as one forward and the tokens of its
    prompts. It has no gradient: `backward` and `slope` raise ConfigError.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch], measure: Measure, key: Hashable = None):
        self.engine, self.batches, self.measure, self.key = engine, batches, measure, key
        self.held = [Held() for _ in batches]

    def sums(self, probes: Sequence[Probe], *, each: bool = False) -> Sums:
        """Sums and weights before division: what ranks exchange."""
        values = torch.cat([self._values(batch, held, probes) for batch, held in zip(self.batches, self.held, strict=True)], 1)
        ones = torch.ones_like(values)
        return (-values, ones) if each else (-values.sum(1), ones.sum(1))

    def _values(self, batch: Batch, held: Held, probes: Sequence[Probe]) -> Tensor:
        """Of the probes and rows of a micro-batch, [P, B] float64."""
        engine = self.engine
        size = batch["input_ids"].numel() if "input_ids" in batch else 0
        counts = engine.forwards + len(probes), engine.tokens + len(probes) * size
        if isinstance(self.measure, AnswerMeasure):
            values = self.measure.together(engine, batch, probes)
        elif self.measure is accuracy and batch.get("criterion") == "accuracy":  # many probes in one forward
            values = torch.stack([-found.nll.double().cpu() for found in engine.together(batch, probes, held)])
        else:
            values = torch.stack([self.measure(engine, batch, probe).double().cpu() for probe in probes])
        engine.forwards, engine.tokens = counts
        return values

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        total, weight = self.sums(probes, each=each)
        return total / weight

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As a ModelObjective of the same rows."""
        return ModelObjective(self.engine, [with_labels(batch) for batch in self.batches]).input_squares(names, onto)

    def hidden_squares(self, names: Sequence[str]) -> Tensor:
        """As a ModelObjective of the same rows."""
        return ModelObjective(self.engine, [with_labels(batch) for batch in self.batches]).hidden_squares(names)

    def hidden_stds(self, names: Sequence[str]) -> dict[str, float]:
        """As a ModelObjective of the same rows."""
        return ModelObjective(self.engine, [with_labels(batch) for batch in self.batches]).hidden_stds(names)

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        """As a ModelObjective of the same rows."""
        return ModelObjective(self.engine, [with_labels(batch) for batch in self.batches]).output_sizes(names)

    def output_squares(self, names: Sequence[str]) -> Tensor:
        """As a ModelObjective of the same rows."""
        return ModelObjective(self.engine, [with_labels(batch) for batch in self.batches]).output_squares(names)

    def perturbed(self, names: Sequence[str], draw: Draw) -> NoReturn:
        raise ConfigError("a reward is not measured under noise on outputs: take es or lozo")

    perturbed_sums = perturbed

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


Score = Callable[[str, str, Sequence[str]], float]  # of (prompt, generated text, accepted texts), the higher the better


class AnswerMeasure:
    """What a score says of the generated answer of each prompt of a batch, less `penalty` times its distance to the base.

    The distance of row i is the loss of theta on the answer that the base model gave to the prompt (`Asked`), less the base's
    own, nats a token: how much less likely the base's answers have become. It needs no copy of the base's weights. Costs a
    forward more; where the base's answer is empty it is 0.
    """

    def __init__(self, answerer: Answerer, score: Score, penalty: float = 0.0):
        self.answerer, self.score, self.penalty = answerer, score, penalty

    def __call__(self, engine: Engine, batch: Batch, probe: Probe = ()) -> Tensor:
        return self.together(engine, batch, [probe])[0]

    def together(self, engine: Engine, batch: Batch, probes: Sequence[Probe]) -> Tensor:
        """[P, B] float64, at theta + each probe."""
        asked = list(zip(batch["prompts"], batch["answers"], strict=True))
        found = [
            [self.score(prompt, text, golds) for (prompt, golds), text in zip(asked, texts, strict=True)]
            for texts in self.answerer.together(engine, batch, probes)
        ]
        values = torch.tensor(found, dtype=torch.float64)
        if self.penalty and "base" in batch:
            losses = engine.together(batch["base"], probes)
            further = torch.stack([per_token(x) for x in losses]) - batch["base_nll"].cpu()
            values[:, batch["base_rows"].cpu()] -= self.penalty * further
        return values


class Reward:
    """A user's function of (prompt, text, answers): a generated text, and those that the data accept; higher is better.

    NaN where it raises or gives no finite number: the candidate that wrote the text then loses. The first such failure is said
    in one line. It does not: end a function that runs forever, or guard against what it does.
    """

    def __init__(self, name: str):
        """Raises ConfigError where there is no such function (`smidgen.user_code`)."""
        self.name, self.function = name, function(name, "reward", ("prompt", "text", "answers"))
        self.failed = 0
        self.first = ""

    def __call__(self, prompt: str, text: str, answers: Sequence[str]) -> float:
        try:
            value = float(self.function(prompt, text, tuple(answers)))
            reason = "" if math.isfinite(value) else f"gave {value}"
        except Exception as error:
            value, reason = math.nan, f"raised {type(error).__name__}: {error}"
        if not reason:
            return value
        if not self.failed:
            self.first = f"reward {self.name} {reason} for {text[:60]!r}"
            notice(f"{self.first}: a candidate without a finite reward loses")
        self.failed += 1
        return math.nan

    def metric(self, prompts: Sequence[str]) -> Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]:
        """The mean reward of answers to these prompts, over those that have one, and how many have none.

        Raises ConfigError where none has one at the first call: there is nothing to start from.
        """
        called = 0

        def measure(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
            nonlocal called
            called += 1
            values = torch.tensor([self(*row) for row in zip(prompts, texts, answers, strict=True)], dtype=torch.float64)
            failed = int(values.isnan().sum())
            if called == 1 and failed == len(values):
                raise ConfigError(f"{self.first}, and fails on every other answer of the model as it is: correct it")
            return {"reward": float(values.nanmean()), "reward_failed": failed}

        return measure
