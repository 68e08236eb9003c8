"""What the user did not say: method options, steps, intervals. Each choice is printed with its source."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from smidgen import activations, adapt, auto, blank, models, optim, presets, pretraining, world
from smidgen import config_file as configuration
from smidgen.chat import FORMS, give_form
from smidgen.config import ConfigError, MemoryRefused, RunConfig, nearest, notice
from smidgen.encode import encode
from smidgen.folder import ENVIRONMENT
from smidgen.head_start import fitted
from smidgen.optim._search import SearchOptimizer
from smidgen.packing import Packs, pack_length
from smidgen.quantising import require_bitsandbytes
from smidgen.stream import TextRows
from smidgen.trainer import method_config, uses_backward


def filled(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The configuration with what presets, `method: auto` and random weights set and the user did not; each choice is said."""
    return presets.fill(auto.resolve(pretraining.fill(config, say), say), say)


def options_of(config: RunConfig) -> dict[str, Any]:
    """The method's options in a configuration whose choices are made."""
    return {"seed": config.seed, **config.method_args, "lr": config.train.learning_rate}


def choose(config: RunConfig, rows: int, say: Callable[[str], None]) -> RunConfig:
    """Fill in what was not given and say each choice with its source. Raises ConfigError for bad options."""
    train, method = config.train, dict(config.method_args)
    lr = method.pop("lr", None) if train.learning_rate is None else train.learning_rate
    backward = uses_backward(config.method)
    if lr is None and config.preset is None:
        suggested = getattr(optim.get(config.method), "SUGGESTED", {}).get(config.scheme, {})
        for key, value in suggested.items():
            if key not in method:
                method[key] = value
                say(f"{key} = {value}  (suggested by {config.method} for scheme {config.scheme})")
        lr = method.pop("lr", None)
    if train.weight_decay:
        method.setdefault("weight_decay", train.weight_decay)
    if backward:
        method.setdefault("max_grad_norm", train.max_grad_norm)
    resolved = method_config(config.method, config.preset, method if lr is None else {**method, "lr": lr})
    if lr is None:
        say(f"lr = {resolved.lr:g}  ({f'preset {config.preset}' if config.preset else f'default of {config.method}'})")
    updates: dict[str, Any] = {"train.learning_rate": resolved.lr}
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    steps = train.max_steps
    if steps is None and train.num_train_epochs is not None:
        steps = max(1, math.ceil(train.num_train_epochs * math.ceil(rows / per_step)))
    elif steps is None and fitted(config.scheme):
        steps = 0
        say(f"steps = 0  (scheme {config.scheme} is fitted; --steps tunes it further)")
    elif steps is None and resolved.steps is not None:
        steps = resolved.steps
        say(f"steps = {steps}  (the budget of {config.method}: {resolved.budget} forwards, {resolved.population} a step)")
    elif steps is None and backward:
        steps = 3 * math.ceil(rows / per_step)
        say(f"steps = {steps}  (3 epochs of {rows} rows, {per_step} rows a step)")
    elif steps is None:
        steps = 2000
        say("steps = 2000  (default without back-propagation; the published runs take 20,000)")
    updates["train.max_steps"] = steps
    updates["train.num_train_epochs"] = None
    if train.eval_steps is None:
        updates["train.eval_steps"] = max(1, steps // 5)
    if train.save_steps is None and not optim.get(config.method).build.replayable(resolved):
        updates["train.save_steps"] = max(1, steps // 5)
    if train.logging_steps is None:
        updates["train.logging_steps"] = max(1, steps // 50)
    return configuration.with_values(config, {**updates, "method_args": method})


def tokenizer_of(config: RunConfig) -> Any:
    """The model's tokenizer, with the form of `chat` as its template. Raises ConfigError."""
    tokenizer = models.load_tokenizer(
        config.model, config.tokenizer, trust_remote_code=config.trust_remote_code, notify=lambda line: None
    )
    if config.chat in FORMS:
        give_form(tokenizer, config.chat)
    return tokenizer


def count_rows(config: RunConfig, examples: Sequence[Any], packed: bool | str) -> int:
    """Rows of an epoch, to choose the number of steps by. Packed rows are encoded for that, unless steps are given."""
    if not packed or config.train.max_steps is not None:
        return 0 if config.streaming else len(examples)
    if config.streaming:
        raise ConfigError("streaming reads rows as the run goes and does not know how many there are: give --steps")
    tokenizer = tokenizer_of(config)
    found = models.load_config(config.model, config.tokenizer, trust_remote_code=config.trust_remote_code)
    context = models.context_length(found, tokenizer)
    if packed == "stream":
        return len(TextRows(examples, tokenizer, pack_length(config.max_length, context)))
    return len(Packs(encode(examples, tokenizer, "causal", pack_length(config.max_length, context), context=context)))


def scheme_config(config: RunConfig) -> Any:
    """The scheme's validated options. Raises ConfigError."""
    scheme = adapt.get(config.scheme)
    known = scheme.Config.model_fields
    for name in config.scheme_args:
        if name not in known:
            raise ConfigError(f"scheme {config.scheme} has no option {name!r}; did you mean {nearest(name, known)!r}?")
    try:
        return scheme.Config(**config.scheme_args)
    except ValidationError as error:
        problem = error.errors()[0]
        rule = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        if not problem["loc"]:  # of several options together
            raise ConfigError(f"scheme {config.scheme}: {rule}") from None
        name = str(problem["loc"][0])
        about = f"{known[name].description}; by default {known[name].default}"
        raise ConfigError(f"scheme_args.{name} = {problem['input']!r}: {rule} ({about})") from None


def room(context: int | None, taken: int, asked: int | None) -> int | None:
    """Positions of a model's context that its scheme leaves to rows. Raises ConfigError where there are not enough."""
    if context is None or not taken:
        return context
    if context - taken < max(2, asked or 0):
        rows = f" and max_length {asked}" if asked else ""
        raise ConfigError(
            f"{taken} virtual tokens{rows} do not fit the model's {context} positions: give fewer of them (scheme_args.tokens)"
            + (f", or max_length at most {context - taken}" if context - taken >= 2 else "")
        )
    return context - taken


def check_start(config: RunConfig) -> None:
    """Raise ConfigError where a method would stand still: A = B = 0 is a saddle, which a search of a space alone leaves."""
    flat = config.scheme == "dfo_lora" and config.scheme_args.get("start", "zero") == "zero"
    if flat and not issubclass(optim.get(config.method).build, SearchOptimizer):
        raise ConfigError(
            f"scheme dfo_lora starts at A = B = 0, where the loss is flat, and {config.method} would not move: set "
            "scheme_args.start=random, or take method cma_es or fireworks"
        )


def check_quantise(config: RunConfig) -> None:
    """Raise ConfigError for a quantised base that cannot be made here, or that the method would have to write."""
    if config.quantise is None:
        return
    require_bitsandbytes(config.quantise)
    if config.scheme == "full" and not optim.get(config.method).build.lazy:
        raise ConfigError(
            f"quantise = {config.quantise}: quantised weights cannot be written, and {config.method} writes all of them: take "
            "a method with low-rank steps (lozo, fzoo, es), or tune an adapter (--scheme lora)"
        )


def check_places(config: RunConfig) -> None:
    """Raise ConfigError for weights on disk, or spread over devices, that the method or the rest of the run cannot do with."""
    key = "offload" if config.offload else "device_map" if config.device_map else None
    if key is None:
        return
    if config.offload == "host" and not torch.cuda.is_available():
        raise ConfigError("offload = host keeps weights beside a CUDA device, and torch sees none: leave it out, or take disk")
    if config.offload and config.device_map:
        raise ConfigError("offload and device_map both say where weights are: leave one out")
    if blank.is_blank(config.model):
        raise ConfigError(f"{key}: {config.model} has no checkpoint to read layer by layer: leave {key} out")
    if config.quantise:
        raise ConfigError(
            f"{key} with quantise = {config.quantise}: quantised layers stay on one device, leave one of both out"
        )
    if uses_backward(config.method) or "slope" in optim.get(config.method).build.uses:
        raise ConfigError(
            f"{key}: {config.method} needs gradients through all layers at once: take a method without, such as zo_sgd"
        )
    if config.train.save_steps is not None:
        raise ConfigError(
            f"{key} with train.save_steps: a checkpoint is all weights in memory; the journal is enough to resume"
        )
    if world.count() > 1:
        raise ConfigError(
            f"{key} on {world.count()} ranks: ranks keep whole copies of the weights in memory: one process, or leave it out"
        )


def activations_config(config: RunConfig) -> Any:
    """The validated options of `activations`; None where it is not set. Raises ConfigError."""
    if config.activations is None:
        if config.activations_args:
            raise ConfigError(
                "activations_args without activations: name the policy too, activations=velora, or leave both out"
            )
        return None
    policy = activations.get(config.activations)
    if not uses_backward(config.method):
        raise ConfigError(
            f"activations = {config.activations!r}, but {config.method} works without back-propagation and keeps nothing of "
            "the forward: leave activations out, or take velora_adamw or another method with back-propagation"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"activations = {config.activations!r} runs as one process: start without torchrun, or leave it out")
    known = policy.Config.model_fields
    for name in config.activations_args:
        if name not in known:
            raise ConfigError(
                f"activations {config.activations} has no option {name!r}; did you mean {nearest(name, known)!r}?"
            )
    try:
        return policy.Config(**config.activations_args)
    except ValueError as error:
        raise ConfigError(f"activations_args: {error}") from None


def training_arguments(config: RunConfig, folder: Path) -> transformers.TrainingArguments:
    """Trainer's own arguments. Raises ConfigError for a name under `train` that it does not have."""
    train = config.train
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    for name in train.extra:
        if name not in known:
            raise ConfigError(
                f"train.{name}: transformers.TrainingArguments has no such field; did you mean {nearest(name, known)!r}?"
            )
    given = {k: v for k, v in train.model_dump(exclude={"extra"}).items() if v is not None}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": config.seed % 2**32,
        "eval_strategy": "steps",
        "save_strategy": "no" if train.save_steps is None else "steps",
        "remove_unused_columns": False,
        "disable_tqdm": True,  # a run prints its own lines
        **(
            {"use_cpu": True} if world.count() > 1 and not torch.cuda.is_available() else {}
        ),  # else each takes itself for alone
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        **{k: v for k, v in given.items() if k not in ("max_grad_norm", "weight_decay")},
        **train.extra,
    }
    try:
        return transformers.TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train: {error}") from None


def same_rows(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of a resumed run whose steps keep their rows though the number of ranks changed.

    Where the groups of rows stay, ranks share probes differently: the same bits. Else other micro-batches: the same up to
    rounding. Raises ConfigError where the rows of a step cannot be shared out evenly.
    """
    path = folder / ENVIRONMENT
    before = int(json.loads(path.read_text()).get("ranks", 1)) if path.exists() else 1
    old, new = before // config.probe_ranks, world.count()
    if before == new:
        return config
    if new % old == 0 and not uses_backward(config.method):
        notice(f"the run was started on {before} ranks, this is {new}: {new // old} in a row share probes, with the same bits")
        return configuration.with_values(config, {"probe_ranks": new // old})
    batch, times = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    whole = batch * times * old
    if whole % new:
        fits = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise ConfigError(
            f"the run in {folder} was started on {before} ranks with {whole} rows a step, which {new} ranks cannot share out "
            f"evenly: resume with {fits} ranks"
        )
    batch, times = (batch, times * old // new) if times * old % new == 0 else (whole // new, 1)
    notice(
        f"the run was started on {before} ranks, this is {new}: {batch} rows x {times} micro-batches a rank, as before "
        f"{whole} rows a step"
    )
    values = {"train.per_device_train_batch_size": batch, "train.gradient_accumulation_steps": times, "probe_ranks": 1}
    return configuration.with_values(config, values)


def memory_line(config: RunConfig, device: str) -> str:
    """Estimated bytes of the weights against free memory, before loading. Raises MemoryRefused when they cannot fit."""
    weights = models.weights_bytes(
        config.model,
        config.dtype,
        device,
        quantise=config.quantise,
        own_tokenizer=config.tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    free = models.available_memory(device)
    if config.offload == "host":
        return f"memory: weights {weights / 2**30:.2f} GiB in host memory, on the device two layers of them"
    if config.offload == "disk":
        disk = shutil.disk_usage(next(p for p in Path(config.output or ".").absolute().parents if p.exists())).free
        text = f"memory: weights {weights / 2**30:.2f} GiB on disk, free there {disk / 2**30:.1f} GiB"
        if weights > disk and not config.force:
            raise MemoryRefused(f"{text}: they do not fit; make room, or name a folder on another disk with --output")
        return text
    text = f"memory: weights {weights / 2**30:.2f} GiB, free {free / 2**30:.1f} GiB"
    if weights > free and not config.force:
        raise MemoryRefused(
            f"{text}: the weights alone do not fit; take a smaller model or dtype bfloat16, or try with --force"
        )
    return text
