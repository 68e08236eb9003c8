"""Evaluation: length-sorted batches -> losses, option scores or generated text -> metrics.

Loss is weighted by label tokens over the whole split. Options are compared by their mean log-likelihood a token, all
of an example in the same arithmetic as one by one; where every option is one token, one forward scores them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smidgen.collate import Collator
from smidgen.data import Corpus
from smidgen.directions import Probe
from smidgen.encode import Encoded, encode, encode_options, encode_prompts
from smidgen.probing import Engine
from smidgen.tasks._example import Example


@dataclass
class Evaluation:
    """One split, encoded once. Calling it gives the metrics at theta + probe.

    rows: the encoded split; options: one row for each option where options have several tokens; golds: index of the
    right option of each example, None for free text; metric: from predictions and golds.
    """

    rows: Encoded
    options: Encoded | None
    golds: list[int] | None
    metric: Callable[[Sequence[int], Sequence[int]], dict[str, float]] | None
    collator: Collator
    batch_size: int

    def __call__(self, engine: Engine, probe: Probe = ()) -> dict[str, float]:
        """Loss (nats a label token, or a row), and the task's metrics. Cost: one forward of the split, or of its options."""
        if self.golds is None:
            return {"loss": self._loss(engine, probe)}
        assert self.metric is not None
        if self.options is not None:
            predictions, loss = self._by_option(engine, probe)
        else:
            predictions, loss = self._at_once(engine, probe)
        return {"loss": loss, **self.metric(predictions, self.golds)}

    def predictions(self, engine: Engine, probe: Probe = ()) -> list[int]:
        """Index of the chosen option of each example."""
        return (self._by_option if self.options is not None else self._at_once)(engine, probe)[0]

    def _batches(self, rows: Encoded, device: torch.device) -> Iterator[tuple[list[int], dict[str, Any]]]:
        lengths = rows.lengths
        order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))  # the longest first: memory fails early
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            batch = self.collator([rows[i] for i in chosen])
            yield chosen, {k: v.to(device) for k, v in batch.items()}

    def _loss(self, engine: Engine, probe: Probe) -> float:
        total, weight = 0.0, 0
        for _, batch in self._batches(self.rows, device_of(engine)):
            nll = engine.losses(batch, probe).nll
            total, weight = total + float(nll.double().sum()), weight + nll.numel()
        return total / weight

    def _at_once(self, engine: Engine, probe: Probe) -> tuple[list[int], float]:
        assert self.golds is not None
        chosen = [0] * len(self.golds)
        total = 0.0
        for members, batch in self._batches(self.rows, device_of(engine)):
            scores = engine.choice_scores(batch, probe).double().cpu()
            golds = torch.tensor([self.golds[self.rows.index[i]] for i in members])
            total += float(torch.nn.functional.cross_entropy(scores, golds, reduction="sum"))
            for i, best in zip(members, scores.argmax(1).tolist(), strict=True):
                chosen[self.rows.index[i]] = best
        return chosen, total / len(self.rows)

    def _by_option(self, engine: Engine, probe: Probe) -> tuple[list[int], float]:
        assert self.golds is not None and self.options is not None
        rows = self.options
        mean: list[dict[int, float]] = [{} for _ in self.golds]
        total, weight = 0.0, 0
        for members, batch in self._batches(rows, device_of(engine)):
            nll, where, _ = engine.losses({k: v for k, v in batch.items() if k != "choices"}, probe)
            sums = torch.zeros(len(members), dtype=torch.float64).index_add(0, where.cpu(), nll.double().cpu())
            counts = torch.bincount(where.cpu(), minlength=len(members))
            for k, i in enumerate(members):
                mean[rows.index[i]][rows.option[i]] = -float(sums[k]) / max(1, int(counts[k]))
                if rows.option[i] == self.golds[rows.index[i]]:
                    total, weight = total + float(sums[k]), weight + int(counts[k])
        return [max(scores, key=lambda o: scores[o]) for scores in mean], total / weight


def device_of(engine: Engine) -> torch.device:
    """Where batches go."""
    return next(engine.model.parameters()).device


def evaluation(
    corpus: Corpus,
    split: str,
    tokenizer: Any,
    kind: str,
    *,
    max_length: int,
    context: int | None,
    collator: Collator,
    batch_size: int,
) -> Evaluation:
    """Encode a split for evaluation. Raises DataError as `smidgen.data` does."""
    examples = corpus.examples(split)
    rows = encode(examples, tokenizer, kind, max_length, context=context)
    if corpus.task is None:
        return Evaluation(rows, None, None, None, _with(collator, rows), batch_size)
    labelled = [e for e in examples if isinstance(e, Example)]
    if kind == "classification":
        golds = [rows[i]["labels"] for i in range(len(rows))]
    else:
        golds = [e.gold for e in labelled if e.gold is not None]
    options = None
    if kind != "classification" and rows.choices is None:
        options = encode_options(labelled, tokenizer, kind, max_length, context=context)
    return Evaluation(rows, options, golds, corpus.task.metric, _with(collator, rows), batch_size)


def _with(collator: Collator, rows: Encoded) -> Collator:
    return Collator(collator.pad_id, collator.kind, rows.choices, collator.position_ids)


def generate(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 8,
    probe: Probe = (),
    kind: str = "causal",
) -> list[str]:
    """Greedy continuations of prompts at theta + probe, through the model's own `generate`."""
    rows = encode_prompts(prompts, tokenizer, kind)
    collator = Collator(tokenizer.pad_token_id, kind)
    texts: list[str] = []
    with torch.no_grad(), engine.displaced(probe):
        engine.model.eval()
        for first in range(0, len(rows), batch_size):
            batch = {k: v.to(device_of(engine)) for k, v in collator(rows[first : first + batch_size]).items()}
            out = engine.model.generate(  # type: ignore[operator]
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            if kind == "causal":
                out = out[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts


def exact_match(texts: Sequence[str], golds: Sequence[str]) -> float:
    """Share of answers equal to the given one: first line, outer white space and letter case aside."""

    def plain(text: str) -> str:
        return (text.strip().splitlines() or [""])[0].strip().lower()

    return sum(plain(t) == plain(g) for t, g in zip(texts, golds, strict=True)) / len(golds)
