"""Memory before a run and at its end: one that would not fit is refused with its plan, one that died of it is explained."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from smidgen import advice, data, estimate, models
from smidgen.advice import Advice, size
from smidgen.blank import is_blank
from smidgen.config import MemoryRefused, RunConfig
from smidgen.planner import Plan

_SMALL = 0.25  # share of the free memory below which no plan is made, since a rough bound says that all is well; chosen

# Where an error was raised -> what the run was doing; looked for from the innermost frame outwards.
_PARTS = (
    (("torch/autograd", "activations/"), "the backward pass"),
    (("smidgen/loss.py",), "the output head and the loss"),
    (("smidgen/params.py", "smidgen/optim/", "torch/optim/"), "the update"),
    (("smidgen/readers.py", "smidgen/directions.py", "smidgen/noise/"), "the displaced weights of a probe"),
    (("transformers/modeling_utils.py", "transformers/core_model_loading.py", "smidgen/models.py"), "loading the weights"),
    (("transformers/models/", "torch/nn/modules", "smidgen/linear.py"), "the forward pass"),
)
_EVALUATING = ("smidgen/evaluate.py", "smidgen/generation.py", "smidgen/scoring.py", "smidgen/pairs.py")


def check(config: RunConfig, corpus: data.Corpus, device: str, say: Callable[[str], None]) -> None:
    """Refuse a run that does not fit, before anything is loaded. Raises MemoryRefused, unless `force` is set.

    Small runs are let through on a rough bound; a model that cannot be simulated is too, with a line that says so, and so are
    pictures and random weights.
    """
    if corpus.pictures or is_blank(config.model):
        return
    free = models.available_memory(device)
    if _bound(config) < _SMALL * free:
        return
    try:
        shape = estimate.shape_of(config, corpus)
        planner = estimate.planner_of(config, shape, device)
        plan = estimate.planned(config, shape, device)
    except estimate.Unplanned as error:
        say(f"memory: {error}; `smidgen plan {config.model} --measure` makes two steps instead")
        return
    if plan.terms.total <= free:
        say(f"memory: planned peak {size(plan.terms.total)}, free {size(free)}")
        return
    parts = ", ".join(f"{name} {size(n)}" for name, n in vars(plan.terms).items() if n >= 0.01 * plan.terms.total)
    change = Advice(planner, free, ()).change(plan.case)
    text = (
        f"{plan.case.label} on {plan.case.scheme} with {planner.rows.rows} rows of {planner.rows.length} tokens needs "
        f"{size(plan.terms.total)} ({parts}), and {size(free)} are free: {change or 'take a smaller model or another method'}; "
        f"`smidgen plan {config.model}` shows every way"
    )
    if not config.force:
        raise MemoryRefused(f"{text}, --force tries it all the same")
    say(f"memory: {text}; tried all the same (--force)")


def _bound(config: RunConfig) -> float:
    """Bytes that a run hardly exceeds, by size alone: eight times its weights, and fifty numbers a token, layer and unit."""
    try:
        text = models.load_config(config.model, trust_remote_code=config.trust_remote_code).get_text_config()
        width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    except AttributeError:
        return float("inf")
    train = config.train
    tokens = max(train.per_device_train_batch_size, train.per_device_eval_batch_size) * (config.max_length or 1024)
    weights = 4 * (12 * layers * width**2 + 2 * vocabulary * width)
    return 8.0 * weights + 4.0 * tokens * (50 * layers * width + 3 * vocabulary)


def part_of(error: BaseException) -> str:
    """What a run was doing when memory ended, read from the frames of the error."""
    files = [Path(frame.filename).as_posix() for frame in traceback.extract_tb(error.__traceback__)]
    during = " of an evaluation" if any(file.endswith(_EVALUATING) for file in files) else ""
    for file in reversed(files):
        for places, part in _PARTS:
            if any(place in file for place in places):
                return part + (during if "pass" in part or "head" in part else "")
    return "an evaluation" if during else "the run"


def explain(config: RunConfig, error: BaseException, folder: Path, kept: bool, device: str) -> str:
    """Which part ran out of memory, at which batch and length, the cheapest change, and how to go on."""
    train = config.train
    part = part_of(error)
    evaluating = "evaluation" in part
    rows = train.per_device_eval_batch_size if evaluating else train.per_device_train_batch_size
    first = (str(error).splitlines() or [type(error).__name__])[0]
    length = f"up to {config.max_length} tokens" if config.max_length else "all their tokens"
    go_on = (
        f"; nothing is lost: with more memory, `smidgen train --resume --output {folder}` goes on where it stopped"
        if kept
        else ""
    )
    return f"out of memory in {part}, with {rows} rows of {length} ({first}): {_change(config, evaluating, device)}{go_on}"


def _change(config: RunConfig, evaluating: bool, device: str) -> str:
    train = config.train
    if evaluating:
        half = max(1, train.per_device_eval_batch_size // 2)
        return f"try train.per_device_eval_batch_size={half}"
    half, twice = max(1, train.per_device_train_batch_size // 2), 2 * train.gradient_accumulation_steps
    usual = f"try --batch {half} train.gradient_accumulation_steps={twice}"
    try:
        shape = estimate.Shape(config.max_length or advice.LENGTH, None, None)
        planner = estimate.planner_of(config, shape, device)
        plan: Plan = estimate.planned(config, shape, device)
        found = Advice(planner, round(0.9 * plan.terms.total), ()).change(plan.case)  # a tenth less than what was not there
    except Exception:  # in a process that is out of memory anything may fail
        return usual
    return f"{usual}; {found}" if found else usual
