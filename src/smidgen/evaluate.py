"""Evaluation: length-sorted batches -> losses, option scores or generated text -> metrics.

Options are compared by their log-likelihoods, all of an example in the same arithmetic as one by one; where every option
is one token, one forward scores them all, and elsewhere the prompt of an example runs once (`smidgen.scoring`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smidgen.collate import Collator
from smidgen.config import ConfigError, DataError
from smidgen.data import Corpus
from smidgen.directions import Probe
from smidgen.encode import Encoded, encode
from smidgen.generation import Answerer, answer_all
from smidgen.loss import group_nll
from smidgen.pairs import PairEvaluation, Pairs
from smidgen.pixels import PixelCollator, Pixels
from smidgen.probing import Batch, Engine
from smidgen.questions import MAX_NEW_TOKENS, Candidates, Prompts
from smidgen.scoring import OptionScorer, best_of_groups, in_batches, on_device
from smidgen.stream import TextRows
from smidgen.tasks._answers import measures
from smidgen.tasks._example import Example

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]

HEADLINES = (
    "reward",
    "accuracy",
    "f1",
    "exact_match",
    "perplexity",
    "loss",
)  # the first that an evaluation has is the measure of a run


@dataclass
class Answers:
    """Questions of a split that are answered by generation, and how the answers are measured."""

    prompts: Prompts
    answerer: Answerer
    metric: Metric

    def texts(self, engine: Engine, batch_size: int, probe: Probe = ()) -> list[str]:
        """An answer for each question."""
        return answer_all(engine, self.answerer, self.prompts, batch_size, probe)


@dataclass
class Evaluation:
    """One split, encoded once. Calling it gives the metrics at theta + probe.

    rows: the encoded split; golds, rights: the right option of each example, and all that count as right, None for free
    text; options: where options have several tokens; metric: from predictions and golds; compared: the loss of such
    options is that of choosing among them, else of the right one's tokens; answers: what is generated; lossless: nothing else
    is measured.
    """

    rows: Encoded | Pixels | TextRows
    collator: Any
    batch_size: int
    golds: list[int] | None = None
    rights: list[frozenset[int]] | None = None
    metric: Metric | None = None
    options: OptionScorer | None = None
    compared: bool = False
    answers: Answers | None = None
    lossless: bool = False

    def __call__(self, engine: Engine, probe: Probe = ()) -> dict[str, float]:
        """Loss (nats a label token, a row or an example), and the task's metrics.

        Cost: one forward of the split, or of its options; besides, where answers are generated, their prompts and one
        forward for each new token.
        """
        found = {} if self.lossless else self._measures(engine, probe)
        if self.answers is not None:
            texts = self.answers.texts(engine, self.batch_size, probe)
            found |= self.answers.metric(texts, self.answers.prompts.answers)
        return found

    def _measures(self, engine: Engine, probe: Probe) -> dict[str, float]:
        if self.golds is None:
            loss = self._loss(engine, probe)
            return {"loss": loss} if not isinstance(self.rows, TextRows) else {"loss": loss, "perplexity": _exp(loss)}
        assert self.metric is not None and self.rights is not None
        predictions, loss = self._chosen(engine, probe)
        forgiven = [
            gold if chosen in right else chosen
            for chosen, gold, right in zip(predictions, self.golds, self.rights, strict=True)
        ]
        return {"loss": loss, **self.metric(forgiven, self.golds)}

    def predictions(self, engine: Engine, probe: Probe = ()) -> list[int]:
        """Index of the chosen option of each example."""
        return self._chosen(engine, probe)[0]

    def _chosen(self, engine: Engine, probe: Probe) -> tuple[list[int], float]:
        return (self._at_once if self.options is None else self._by_option)(engine, probe)

    def _batches(self, engine: Engine) -> Iterator[tuple[list[int], Batch]]:
        for chosen in in_batches(range(len(self.rows)), self.rows.lengths, self.batch_size):
            yield chosen, on_device(self.collator([self.rows[i] for i in chosen]), engine)

    def _loss(self, engine: Engine, probe: Probe) -> float:
        total, weight = 0.0, 0
        for _, batch in self._batches(engine):
            nll = engine.losses(batch, probe).nll
            total, weight = total + float(nll.double().sum()), weight + nll.numel()
        return total / weight

    def _at_once(self, engine: Engine, probe: Probe) -> tuple[list[int], float]:
        assert self.golds is not None
        chosen = [0] * len(self.golds)
        total = 0.0
        for members, batch in self._batches(engine):
            scores = engine.choice_scores(batch, probe).double().cpu()
            golds = torch.tensor([self.golds[self.rows.index[i]] for i in members])
            total += float(torch.nn.functional.cross_entropy(scores, golds, reduction="sum"))
            for i, best in zip(members, scores.argmax(1).tolist(), strict=True):
                chosen[self.rows.index[i]] = best
        return chosen, total / len(self.rows)

    def _by_option(self, engine: Engine, probe: Probe) -> tuple[list[int], float]:
        assert self.golds is not None and self.options is not None
        sums = self.options(engine, probe)
        scores = sums.scores(self.collator.scoring)
        candidates = self.options.candidates
        groups = torch.tensor(candidates.options.index)
        best = best_of_groups(scores, groups)
        golds = torch.tensor([rows[gold] for rows, gold in zip(candidates.rows, self.golds, strict=True)])
        if self.compared:
            loss = float(group_nll(scores, groups, golds).mean())
        else:
            loss = float(sums.nll[golds].sum() / sums.tokens[golds].sum())
        return [candidates.options.option[k] for k in best], loss


def _exp(loss: float) -> float:
    """The perplexity of a loss; infinite where it is beyond all numbers."""
    return math.exp(loss) if not loss > 700 else math.inf


def evaluation(
    corpus: Corpus,
    split: str,
    tokenizer: Any,
    kind: str,
    *,
    max_length: int,
    context: int | None,
    batch_size: int,
    position_ids: bool = False,
    scoring: str = "mean",
    compared: bool | None = None,
    generated: bool = False,
    new_tokens: int = MAX_NEW_TOKENS,
    reward: Any = None,
    stream: int | None = None,
) -> Evaluation | PairEvaluation:
    """Encode a split for evaluation; of pairs, before their reference is known. Raises DataError as `smidgen.data` does.

    compared: see Evaluation, None: as the task trains; generated: answers are generated although the task is not one of
    free answers; reward: a `rewards.Reward` of the answers; such rows need no answer of their own; stream: the length of
    rows of a text stream.
    """
    if stream is not None:
        return Evaluation(TextRows(corpus.texts(split), tokenizer, stream), Collator(tokenizer.pad_token_id, kind), batch_size)
    examples: Sequence[Any] = corpus.examples(split, kind, tokenizer)
    if corpus.beta is not None:
        pairs = Pairs(examples, tokenizer, kind, max_length, beta=corpus.beta, context=context)
        return PairEvaluation(pairs, Collator(tokenizer.pad_token_id, kind, position_ids=position_ids), batch_size)
    if reward is not None:
        return _rewarded(examples, tokenizer, kind, max_length, context, batch_size, new_tokens, reward)
    task = corpus.task
    if kind == "image":
        assert task is not None
        golds = [e.gold or 0 for e in examples]
        rights = [frozenset({gold}) for gold in golds]
        return Evaluation(Pixels(examples, tokenizer), PixelCollator(), batch_size, golds, rights, task.metric)
    rows = encode(examples, tokenizer, kind, max_length, context=context)
    found = Evaluation(rows, Collator(tokenizer.pad_token_id, kind, rows.choices, position_ids, scoring), batch_size)
    free = task is not None and task.free
    if free or generated:
        if kind not in ("causal", "seq2seq"):
            raise ConfigError(f"answers are generated, which a model of kind {kind} does not do: use a causal or seq2seq model")
        prompts = Prompts(examples, tokenizer, kind, max_length, context=context, new_tokens=new_tokens)
        metric = task.metric if task is not None and free else measures
        found.answers = Answers(prompts, Answerer(tokenizer, kind, max_new_tokens=new_tokens), metric)
    if task is None or free or not task.judged:
        return found
    found.metric = task.metric
    found.compared = task.choice if compared is None else compared
    labelled = [e for e in examples if isinstance(e, Example) and e.gold is not None]
    golds = [e.gold or 0 for e in labelled]
    found.golds, found.rights = golds, [frozenset(e.right) | {g} for e, g in zip(labelled, golds, strict=True)]
    if kind == "masked" and rows.choices is None:
        raise DataError(same_words(corpus.name))
    if kind != "classification" and rows.choices is None:
        candidates = Candidates(labelled, tokenizer, kind, max_length, context=context)
        found.options = OptionScorer(candidates, found.collator, batch_size)
    return found


def _rewarded(
    examples: Sequence[Any],
    tokenizer: Any,
    kind: str,
    max_length: int,
    context: int | None,
    batch_size: int,
    new_tokens: int,
    reward: Any,
) -> Evaluation:
    """The evaluation of generated answers by a reward alone; its rows are the prompts."""
    prompts = Prompts(examples, tokenizer, kind, max_length, context=context, new_tokens=new_tokens, needed=False)
    answerer = Answerer(tokenizer, kind, max_new_tokens=new_tokens, whole_text=True)
    answers = Answers(prompts, answerer, reward.metric(prompts.texts))
    return Evaluation(prompts.encoded, Collator(tokenizer.pad_token_id, kind), batch_size, answers=answers, lossless=True)


def same_words(name: str) -> str:
    """Why a masked model cannot choose among options of their own."""
    return (
        f"a masked model fills in one of the same label words in every row, and the rows of '{name}' have options of their "
        "own: use a causal or seq2seq model"
    )
