"""Option scoring: the log-likelihood of every option of every example, at theta + probe.

Plain: one row an option, prompt and option together. Shared: the prompts of a batch of examples run once with a
key-value cache, then only the tokens that differ, for every option. Both add the same terms in another order: 1e-5 nats
in float32. Shared is for causal models with an ordinary cache; two examples are scored both ways first, and a model whose
answers differ is scored plainly, which one line says. Does not do: calibration by a prompt without content.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from smidgen.collate import Collator
from smidgen.directions import Probe
from smidgen.drafts import IGNORED
from smidgen.loss import NOT_INPUTS
from smidgen.probing import Batch, Engine
from smidgen.questions import Candidates

log = logging.getLogger("smidgen")

# Share of the plain way's tokens above which prompts are not shared. Measured on the embedded model, one CPU thread: at 0.75
# (COPA) both ways take as long, at 0.26 (ReCoRD) the shared one a third.
_WORTH = 0.7
_TOLERANCE = 2e-4  # nats a token between the two ways in float32; chosen, twenty times what rounding makes
_TOLERANCE_16 = 0.1  # the same with 16-bit weights; chosen


class Sums(NamedTuple):
    """Of each row: what its labels cost, and how many they are."""

    nll: Tensor  # [R] float64 on the CPU, nats
    tokens: Tensor  # [R] int64

    def scores(self, scoring: str) -> Tensor:
        """Log-likelihoods as options are compared: a token ('mean') or whole ('sum')."""
        return -self.nll / self.tokens.clamp(min=1) if scoring == "mean" else -self.nll


def row_sums(engine: Engine, batch: Batch, probe: Probe = ()) -> Sums:
    """Sums of the rows of a batch, over the whole vocabulary. Cost: one forward."""
    plain = {k: v for k, v in batch.items() if k not in NOT_INPUTS or k == "labels"}
    nll, rows, size = engine.losses(plain, probe)
    rows = rows.cpu()
    total = torch.zeros(size, dtype=torch.float64).index_add(0, rows, nll.double().cpu())
    return Sums(total, torch.bincount(rows, minlength=size))


def best_of_groups(scores: Tensor, groups: Tensor) -> list[int]:
    """The row with the highest score of each group, the first of equal ones. scores [R], groups [R] in 0..B-1 -> B rows."""
    best: dict[int, int] = {}
    values = scores.tolist()
    for row, group in enumerate(groups.tolist()):
        if group not in best or values[row] > values[best[group]]:
            best[group] = row
    return [best[group] for group in sorted(best)]


def in_batches(members: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Members in batches, the longest first: little padding, and memory fails early."""
    order = sorted(members, key=lambda i: (-lengths[i], i))
    return [order[first : first + size] for first in range(0, len(order), size)]


def on_device(batch: dict[str, Any], engine: Engine) -> Batch:
    """The batch with its tensors where the model is."""
    device = next(engine.model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class OptionScorer:
    """Sums of every option of every example; `shared` says whether the prompt of an example runs once.

    Cost: the tokens of all rows; shared: the prompts once and the options' own tokens, each option one token longer.
    Memory: a forward of `batch_size` rows; shared: besides, the key-value cache of as many prompts, twice.
    """

    def __init__(self, candidates: Candidates, collator: Collator, batch_size: int):
        self.candidates, self.collator, self.batch_size = candidates, collator, batch_size
        self._cuts: list[int] = []  # tokens of each example's rows that run once
        self.shared = collator.kind == "causal" and self._worth()
        self._compared = False

    def __call__(self, engine: Engine, probe: Probe = ()) -> Sums:
        """Sums of the rows of `candidates.options`, in their order."""
        if self.shared and _has_virtual_tokens(engine.model):
            self.shared = False
            log.warning("virtual tokens stand before every row: each option runs with its whole prompt")
        if self.shared and not self._compared:
            self._compare(engine)
        return self._score(engine, probe, range(len(self.candidates)))

    def _score(self, engine: Engine, probe: Probe, examples: Sequence[int]) -> Sums:
        count = len(self.candidates.options)
        found = Sums(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64))
        (self._by_prompt if self.shared else self._by_row)(engine, probe, examples, found)
        return found

    def _by_row(self, engine: Engine, probe: Probe, examples: Sequence[int], found: Sums) -> None:
        options = self.candidates.options
        members = [k for e in examples for k in self.candidates.rows[e]]
        for chosen in in_batches(members, options.lengths, self.batch_size):
            batch = on_device(self.collator([options[k] for k in chosen]), engine)
            found.nll[chosen], found.tokens[chosen] = row_sums(engine, batch, probe)

    # -- shared prompts -----------------------------------------------------------------------------------------------

    def _worth(self) -> bool:
        """Find where each example's rows part; whether running the prompts once saves enough."""
        options = self.candidates.options
        self._cuts = [_cut([options[k] for k in rows]) for rows in self.candidates.rows]
        saved = sum(cut * (len(rows) - 1) for cut, rows in zip(self._cuts, self.candidates.rows, strict=True))
        whole = sum(options.lengths)
        return min(self._cuts) > 0 and whole - saved <= _WORTH * whole

    def _compare(self, engine: Engine) -> None:
        """Score two examples both ways at theta; give sharing up where they differ."""
        self._compared = True
        order = sorted(range(len(self._cuts)), key=lambda e: self._cuts[e])
        few = [order[0], order[len(order) // 2]]
        rows = [k for e in few for k in self.candidates.rows[e]]
        reason = "virtual tokens stand before every row" if _virtual(engine.model) else ""
        try:
            shared = None if reason else self._score(engine, (), few).scores("mean")
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            shared, reason = None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.shared = False
        if shared is not None:
            difference = float((self._score(engine, (), few).scores("mean") - shared)[rows].abs().max())
            half = next(engine.model.parameters()).element_size() == 2
            self.shared = difference <= (_TOLERANCE_16 if half else _TOLERANCE)
            reason = f"with one, scores differ by {difference:.2g} nats a token"
        if not self.shared:
            log.warning("no key-value cache can be shared among options (%s): each runs with its whole prompt", reason)

    def _by_prompt(self, engine: Engine, probe: Probe, examples: Sequence[int], found: Sums) -> None:
        options = self.candidates.options
        for chosen in in_batches(examples, self._cuts, self.batch_size):
            firsts = [options[self.candidates.rows[e][0]]["input_ids"][: self._cuts[e]] for e in chosen]
            prompts = on_device(self.collator([{"input_ids": ids} for ids in firsts]), engine)
            prompts = {k: v for k, v in prompts.items() if k not in NOT_INPUTS}
            engine.prepare({**prompts, "labels": prompts["input_ids"]})
            cache = DynamicCache(config=engine.model.config)  # type: ignore[arg-type]
            labels = torch.full_like(prompts["input_ids"], IGNORED)  # no loss: the pass fills the cache
            engine.losses({**prompts, "labels": labels, "past_key_values": cache}, probe)
            rows = [(place, k) for place, e in enumerate(chosen) for k in self.candidates.rows[e]]
            starts = {k: self._cuts[chosen[place]] for place, k in rows}
            rows.sort(key=lambda row: starts[row[1]] - options.lengths[row[1]])
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                members = [k for _, k in part]
                tails = [{key: v[starts[k] :] for key, v in options[k].items()} for k in members]
                batch = self._continued(prompts, cache, [place for place, _ in part], tails)
                found.nll[members], found.tokens[members] = row_sums(engine, batch, probe)

    def _continued(self, prompts: Batch, cache: DynamicCache, places: list[int], tails: Sequence[dict[str, Any]]) -> Batch:
        """The batch of some tails, padded at the right, each after the cached prompt at its place."""
        device = prompts["input_ids"].device
        width = max(len(tail["input_ids"]) for tail in tails)

        def padded(rows: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

        where = torch.tensor(places, device=device)
        before = prompts["attention_mask"][where]
        mask = padded([[1] * len(tail["input_ids"]) for tail in tails], 0)
        batch = {
            "input_ids": padded([tail["input_ids"] for tail in tails], self.collator.pad_id),
            "attention_mask": torch.cat([before, mask], dim=1),
            "labels": padded([tail["labels"] for tail in tails], IGNORED),
            "past_key_values": _selected(cache, where),
        }
        if "position_ids" in prompts:  # a padded position is never read; the last real one is a position that exists
            batch["position_ids"] = before.sum(1, keepdim=True) + (mask.cumsum(1) - 1)
        return batch


def _virtual(model: Any) -> bool:
    """Whether PEFT puts virtual tokens before what a model is given: it would put them before the options too."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _has_virtual_tokens(model: Any) -> bool:
    """Whether PEFT puts a prefix or soft prompt before whatever the model is given: a cached prompt would get a second."""
    import peft

    return isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning


def _cut(rows: Sequence[dict[str, Any]]) -> int:
    """How many tokens the rows of an example share, up to the one from which the first label is predicted."""
    ids = [row["input_ids"] for row in rows]
    first = min(next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in rows)
    common = 0
    while common < first - 1 and all(common < len(row) and row[common] == ids[0][common] for row in ids):
        common += 1
    return common


def _selected(cache: DynamicCache, places: Tensor) -> DynamicCache:
    """A new cache with some rows of another, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(places)
    return chosen
