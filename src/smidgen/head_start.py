"""Head start: a classification head, or the label words' rows of an output head, is fitted to the training rows first.

What reaches the head is cached for some training rows, one forward each, and `smidgen.convex` fits the head to it: logistic or
ridge regression, no learning rate. A head that comes with the model is moved from where it is, and a penalty holds it there;
a new one, and a readout, starts at zero. What is held out to choose the penalty (and the readout's layers) is a quarter of
these training rows. The same rows, bits and forwards at every start of a run, so a resumed run fits again.

Memory: the features in float32, rows x width of the head's input, beside a plain forward's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen import adapt, convex, noise
from smidgen.adapt._untied import untied_head
from smidgen.collate import Collator
from smidgen.config import ConfigError, DataError, RunConfig
from smidgen.data import Corpus
from smidgen.drafts import IGNORED
from smidgen.encode import Encoded
from smidgen.kinds import Kind
from smidgen.loss import targets
from smidgen.noise import philox
from smidgen.params import Entry, tensor_id
from smidgen.probing import Batch, Engine
from smidgen.scoring import in_batches, on_device
from smidgen.tasks import Example

ROWS = 1000  # training rows that are read; chosen: with more, the prototype's heads gained nothing beyond their spread
HELD = 4  # one row in so many chooses
LEAST = 8  # rows


def fitted(scheme: str) -> bool:
    """Whether a scheme's tensors are always fitted first."""
    return getattr(adapt.get(scheme), "FITTED", False)


def wanted(config: RunConfig) -> bool:
    """Whether a run begins with a fit."""
    return config.head_start == "readout" or fitted(config.scheme)


def shown(config: RunConfig, kind: Kind) -> tuple[Kind, Kind | None]:
    """(what the tuned model predicts, whose prompts it reads): a readout turns every model into a classifier."""
    if not fitted(config.scheme):
        return kind, None
    return "classification", kind if kind in ("causal", "seq2seq") else None


def refuse(config: RunConfig, corpus: Corpus, goal: str) -> None:
    """Raise ConfigError where the data or the objective leave nothing to fit, before a model is loaded."""
    if not wanted(config):
        return
    name = f"scheme {config.scheme}" if fitted(config.scheme) else "head_start readout"
    if corpus.pictures:
        raise ConfigError(f"{name} reads texts, and the rows of '{corpus.name}' are pictures: tune the head (--scheme head)")
    if corpus.words is None:
        raise ConfigError(
            f"{name} fits a classifier of the same classes in every row, and '{corpus.name}' has none: take a labelled task, "
            "or columns text and label"
        )
    if goal not in ("choice", "answer", "accuracy"):
        raise ConfigError(f"{name} learns which class is right, and objective {goal} has no classes: choice or answer")


@dataclasses.dataclass
class Prompted(Corpus):
    """A corpus whose rows reach a classifier as the prompts of another kind of model."""

    form: Kind = "causal"

    def examples(self, split: str, kind: str = "causal", tokenizer: Any = None) -> list[Any]:
        """As a corpus, asked as `form` is asked; the text to classify is the prompt."""
        found = super().examples(split, self.form, tokenizer)
        return [dataclasses.replace(e, text=(e.prompt,)) if isinstance(e, Example) else e for e in found]


def prompted(corpus: Corpus, asked: Kind | None) -> Corpus:
    """The corpus as `shown` says that it is read."""
    if asked is None:
        return corpus
    kept = {field.name: getattr(corpus, field.name) for field in dataclasses.fields(Corpus)}
    return Prompted(**kept, form=asked)


def prepare(config: RunConfig, model: Any, tokenizer: Any, kind: Kind) -> tuple[Kind, Kind | None]:
    """Make a loaded model ready for its scheme: an output head that is fitted no longer shares the embedding's tensor, and
    prompts that a readout reads are cut at their left. Returns `shown`."""
    kind, asked = shown(config, kind)
    if asked is not None:
        tokenizer.truncation_side = "left"
    if config.head_start == "readout" and kind != "classification":
        untied_head(model)
    return kind, asked


def begin(config: RunConfig, trainer: Any, loaded: Any, prepared: Any, corpus: Corpus, dev: Any, say: Any) -> dict[str, Any]:
    """Where a run begins with a fit: make it, say it, and return what result.json says of it; else nothing.

    The tensors that are written count as made for the run: its journal's `init.safetensors` holds them.
    """
    if not wanted(config):
        return {}
    adapted, words = loaded.adapted, list(corpus.words or ())
    size, engine = config.train.per_device_eval_batch_size, trainer.engine
    before = engine.forwards
    written, facts = start(engine, adapted, prepared.rows, prepared.collator, loaded.drawn, words, config.seed % 2**63, size)
    # In the batches of a step, as all forwards of a run are counted, whatever the size of those that were read.
    facts["forwards"] = math.ceil(facts["rows"] / config.train.per_device_train_batch_size)
    engine.forwards = before + facts["forwards"]
    adapted.fresh.extend(name for name in written if name not in adapted.fresh)  # the trainer holds this list
    after = trainer.measure(dev)
    shown = ("reads", "penalty", "held_out_loss", "held_out_accuracy")
    say("fitted  " + "  ".join(f"{k} {facts[k]:.4g}" if isinstance(facts[k], float) else f"{k} {facts[k]}" for k in shown))
    return {"head_start": facts, "start": after}


def start(
    engine: Engine,
    adapted: Any,
    rows: Any,
    collator: Collator,
    drawn: Sequence[str],
    words: Sequence[str],
    seed: int,
    size: int,
) -> tuple[list[str], dict[str, Any]]:
    """Fit the head of a model under its scheme and write it. Returns the names of the tensors that were written, and what was
    chosen, for result.json.

    rows: the encoded training rows; drawn: names of tensors that the checkpoint did not hold; words: of the classes; size: of
    a batch. Cost: a forward of at most `rows` rows, counted by the engine. Raises ConfigError for label words of several
    tokens and for a head that the scheme does not tune, DataError for fewer than 8 rows.
    """
    if engine.kind != "classification" and (not isinstance(rows, Encoded) or rows.choices is None):
        raise ConfigError(
            f"head_start readout sets one row of the output head for each label word, and these are not one token each here: "
            f"{', '.join(words)}: choose other `words`, or use scheme readout, which needs none"
        )
    collator = dataclasses.replace(collator, choices=rows.choices)
    options = getattr(adapted, "options", None)
    order = _order(len(rows), seed)[: ROWS if options is None else options.rows]
    if len(order) < LEAST:
        raise DataError(f"a head is fitted to {LEAST} training rows or more, and there are {len(order)}")
    first = on_device(collator([rows[i] for i in order[:2]]), engine)
    engine.prepare(first)
    head = _head(engine, first, len(words))
    weight, bias = engine.entry_of(head.weight), None if head.bias is None else engine.entry_of(head.bias)
    if weight is None:
        raise ConfigError("head_start readout writes the output head, which this scheme does not tune: use scheme head or full")
    X, y = _features(engine, head, rows, collator, order, size)
    chosen = slice(None) if engine.kind == "classification" else torch.tensor(rows.choices)
    new = weight.name in drawn or hasattr(adapted, "blocks")
    W, b = weight.storage[chosen].float().cpu(), None if head.bias is None else head.bias.detach()[chosen].float().cpu()
    blocks = getattr(adapted, "blocks", {"head": slice(0, X.shape[1])})
    held = torch.zeros(len(order), dtype=torch.bool)
    held[: len(order) // HELD] = True
    offset = None if new else F.linear(X, W, b)
    how: convex.How = "logistic" if options is None else options.fit
    found = convex.fit(X, y, len(words), held, blocks, how=how, offset=offset, intercept=bias is not None)
    written = [_write(engine, weight, chosen, found.weight if new else W + found.weight, seed)]
    if bias is not None and found.bias is not None:
        written.append(_write(engine, bias, chosen, found.bias if new else b + found.bias, seed))
    facts: dict[str, Any] = {"rows": len(order), "held_out": int(held.sum())}
    facts |= {"reads": found.block, "penalty": found.penalty, "held_out_loss": found.loss, "held_out_accuracy": found.accuracy}
    return written, facts


def _order(rows: int, seed: int) -> list[int]:
    """A permutation of the training rows, addressed by the seed."""
    address = noise.Address(seed, tensor_id("head_start"), 0, 0, philox.DATA)
    words = philox.words(address, torch.arange(-(-rows // 4))).flatten()[:rows]
    return torch.argsort(words, stable=True).tolist()


def _write(engine: Engine, entry: Entry, chosen: Any, values: Tensor, seed: int) -> str:
    """Put values into some rows of a tensor, rounded to nearest."""
    whole = entry.storage.float()
    whole = whole.clone() if whole is entry.storage else whole
    whole[chosen] = values.to(whole.device)
    engine.view.write_(entry.name, whole, at=noise.Address(seed, 0, 0, 0, philox.INIT), rounding="nearest")
    return entry.name


def _head(engine: Engine, batch: Batch, classes: int) -> nn.Linear:
    """The linear layer that makes the scores: the output head, or the last one of a classifier to be called."""
    if engine.kind != "classification":
        if not isinstance(engine.head, nn.Linear):
            raise ConfigError(f"head_start readout fits a linear output head, and this model's is {type(engine.head).__name__}")
        return engine.head
    called: list[nn.Linear] = []
    hooks = [
        m.register_forward_hook(lambda m, *_: called.append(m)) for m in engine.model.modules() if isinstance(m, nn.Linear)
    ]
    forwards, tokens = engine.forwards, engine.tokens
    try:
        engine.choice_scores(batch)
    finally:
        engine.forwards, engine.tokens = forwards, tokens
        for hook in hooks:
            hook.remove()
    if not called or called[-1].out_features != classes:
        raise ConfigError(f"{type(engine.model).__name__} ends in no linear layer of {classes} classes: leave head_start out")
    return called[-1]


def _features(
    engine: Engine, head: nn.Linear, rows: Encoded, collator: Collator, order: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """What reaches the head for each row of an order, [n, D] float32, and the rows' classes [n]; on the CPU."""
    X = torch.empty(len(order), head.in_features)
    y = torch.tensor([_class(rows[i]["labels"], rows.choices) for i in order])
    lengths = rows.lengths
    for places in in_batches(range(len(order)), [lengths[i] for i in order], size):
        batch = on_device(collator([rows[order[place]] for place in places]), engine)
        with _tapped(engine, head, batch) as caught:
            at = engine.choice_scores(batch)
        x = caught[0]
        if x.ndim == 3:  # a classifier that scores every position and keeps one: the scores said which
            x = x[torch.arange(len(x), device=x.device), at[:, 0].long()]
        X[places] = x.float().cpu()
    return X, y


@contextlib.contextmanager
def _tapped(engine: Engine, head: nn.Linear, batch: Batch) -> Iterator[list[Tensor]]:
    """Inside this context what reaches the head is caught; label words: at the position of the label."""
    caught: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        keep = targets(batch["labels"], engine.kind).keep
        caught.append(args[0][:, args[0].shape[1] - keep.shape[1] :][keep])  # virtual tokens stand before the row

    def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        caught.append(args[0])
        if out.ndim == 2:
            return None
        return torch.arange(out.shape[1], device=out.device).float()[None, :, None].expand(out.shape)

    words = engine.kind != "classification"
    hook = head.register_forward_pre_hook(before, prepend=True) if words else head.register_forward_hook(after)
    try:
        yield caught
    finally:
        hook.remove()


def _class(labels: int | Sequence[int], choices: Sequence[int] | None) -> int:
    if isinstance(labels, int):
        return labels
    assert choices is not None
    return choices.index(next(label for label in labels if label != IGNORED))
