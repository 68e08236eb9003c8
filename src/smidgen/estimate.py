"""What one run's configuration needs, by the planner: the case that it is, its peak by term, whether that is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smidgen import advice, data, models
from smidgen.chat import FORMS, give_form
from smidgen.config import ConfigError, RunConfig
from smidgen.encode import encode
from smidgen.kinds import Kind, detect_kind
from smidgen.loss import IGNORE
from smidgen.planner import Case, Passes, Plan, Planner
from smidgen.splits import take
from smidgen.tasks import Pair


class TooLarge(ConfigError):  # noqa: N818 - what is, not what broke
    """A case that does not keep to a memory."""


class Unplanned(ConfigError):  # noqa: N818 - what is, not what broke
    """A case that the planner cannot simulate; measuring still tells."""


_READ = 256  # training rows from which lengths are taken; chosen
_RECOMPUTED = 1.0  # forwards that activation checkpointing adds to a back-propagation


@dataclass(frozen=True)
class Shape:
    """What the data of a run ask of its model."""

    length: int  # tokens of a row
    labels: int | None  # labelled positions of a row; None: all
    classes: int | None  # of labelled rows


def case_of(config: RunConfig) -> Case:
    """The case that a configuration is."""
    keep: Any = "checkpointing" if config.train.extra.get("gradient_checkpointing") else config.activations or "all"
    options = {k: v for k, v in config.method_args.items() if k != "lr"}
    return Case(config.method, config.scheme, keep, options, config.scheme_args)


def shape_of(config: RunConfig, corpus: data.Corpus) -> Shape:
    """What the training rows ask of a model, from the first of them. Raises DataError and ConfigError."""
    classes = None if corpus.words is None else len(corpus.words)
    found = models.load_config(config.model, trust_remote_code=config.trust_remote_code)
    kind: Kind = detect_kind(found, classes is not None) if config.kind == "auto" else config.kind
    tokenizer = models.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code, notify=lambda line: None)
    context = models.context_length(found, tokenizer)
    if config.chat in FORMS:
        give_form(tokenizer, config.chat)
    examples: Any = take(corpus.examples("train", kind, tokenizer), _READ, repr)
    if config.packing or isinstance(examples[0], Pair):
        return Shape(config.max_length or min(advice.LENGTH, context or advice.LENGTH), None, classes)
    encoded = encode(examples, tokenizer, kind, config.max_length, context=context)
    if kind == "classification":
        return Shape(encoded.max_length, None, classes)
    labelled = sum(label != IGNORE for k in range(len(encoded)) for label in encoded[k]["labels"])
    return Shape(encoded.max_length, max(1, math.ceil(labelled / len(encoded))), classes)


def planned(config: RunConfig, shape: Shape, device: str) -> Plan:
    """The plan of a run. Raises Unplanned where its model, scheme or method cannot be simulated."""
    try:
        return planner_of(config, shape, device).plan(case_of(config))
    except Exception as error:
        raise Unplanned(f"{config.model}, {config.scheme}, {config.method}: no plan ({error})") from error


def planner_of(config: RunConfig, shape: Shape, device: str) -> Planner:
    """The planner of a run. Raises ConfigError where its model cannot be simulated."""
    found = models.load_config(config.model, trust_remote_code=config.trust_remote_code)
    model = advice.model_of(found, config.dtype, device, shape.classes)
    kind: Kind = detect_kind(found, shape.classes is not None) if config.kind == "auto" else config.kind
    rows = advice.rows_of(config.train.per_device_train_batch_size, max(2, shape.length), shape.labels)
    return Planner(replace(model, kind=kind, quantise=config.quantise), rows)


def forwards_of(passes: Passes, checkpointed: bool, below: float = 0.0) -> float:
    """What a step costs in forwards of its batch: a back-propagation two besides its forward, for the share of the tuned
    weights that it reaches, and another one where it recomputes; a tangent two.

    >>> forwards_of(Passes(0, 1, 0, 0), False)
    3.0
    """
    back = 1 + 2 * (1 - below) + (_RECOMPUTED if checkpointed else 0.0)
    return passes.forwards + 2.0 * passes.slopes + back * passes.backwards


def cost(planner: Planner, case: Case) -> float:
    """Forwards of a step of a case."""
    found, sizes = planner.passes(case)
    total = sum(sizes.values())
    below = sum(size for name, size in sizes.items() if name in found.below) / total if total else 0.0
    return forwards_of(found, case.keep == "checkpointing", below)


def fitting(planner: Planner, case: Case, memory: int) -> tuple[int, Plan]:
    """The most rows at once, halving the batch, with which a case keeps to a memory; and its plan. The rest accumulates.
    Raises TooLarge where one row does not fit."""
    rows = planner.rows.rows
    while True:
        found = Planner(planner.model, replace(planner.rows, rows=rows)).plan(case)
        if found.terms.total <= memory:
            return rows, found
        if rows == 1:
            raise TooLarge(
                f"{case.label} ({case.scheme}) needs {advice.size(found.terms.total)} even for one row at a time, "
                f"and {advice.size(memory)} are allowed"
            )
        rows = max(1, rows // 2)


def as_terms(plan: Plan) -> Mapping[str, int]:
    """A plan for a record: bytes by term, and their total."""
    return {**vars(plan.terms), "total": plan.terms.total}
