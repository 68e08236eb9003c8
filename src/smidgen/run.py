"""One run from configuration to result: what `smidgen train` does, as a function."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from smidgen import __version__, activations, adapt, data, memory, models, presets
from smidgen import config_file as configuration
from smidgen import folder as folders
from smidgen.card import model_card
from smidgen.config import ConfigError, Interrupted, MemoryRefused, RunConfig, UserError, notice
from smidgen.evaluate import HEADLINES, Evaluation, evaluation
from smidgen.goal import GENERATED, choose_goal, prepare
from smidgen.kinds import Kind, detect_kind, head_of
from smidgen.moving import Moving
from smidgen.params import canonical
from smidgen.provenance import weights_sha256
from smidgen.settings import activations_config, choose, memory_line, options_of, scheme_config, training_arguments
from smidgen.signals import Signals
from smidgen.trainer import Trainer, method_config, uses_backward

Say = Callable[[str], None]

_EVAL_LENGTH = 1024  # tokens of a row in evaluation, unless training asks for more; chosen


@dataclass
class Loaded:
    """A model under its scheme, ready to be tuned."""

    adapted: Any  # an `Adapted` of smidgen.adapt
    tokenizer: Any
    kind: Kind
    context: int | None


def device() -> str:
    """Where a run computes: the first CUDA device, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(config: RunConfig, classes: int | None) -> Loaded:
    """The model of a configuration under its scheme; classes: of labelled rows, else None. Raises ConfigError."""
    options = scheme_config(config)
    model, tokenizer, kind = models.load_model(
        config.model,
        config.kind,
        config.dtype,
        classes,
        device(),
        seed=config.seed % 2**63,
        trust_remote_code=config.trust_remote_code,
    )
    context = _room(models.context_length(model.config, tokenizer), options.positions, config.max_length)
    scheme = adapt.get(config.scheme)
    adapted = scheme.build(
        model, options, seed=config.seed % 2**63, fresh=[canonical(n) for n in models.fresh_parameters(model)]
    )
    return Loaded(adapted, tokenizer, kind, context)


def _room(context: int | None, taken: int, asked: int | None) -> int | None:
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


def say_aloud(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def finetune(config: RunConfig, *, dry_run: bool = False, say: Say = say_aloud) -> dict[str, Any]:
    """Train as configured and return the content of result.json. Everything that can be refused is refused before the
    folder is touched. Raises UserError, whose `exit_code` is the command's."""
    config = folders.resumed(config) if config.resume else presets.fill(config, say)
    scheme_config(config)
    activations_config(config)
    method_config(config.method, config.preset, config.method_args)
    folder = Path(config.output) if config.output else folders.default_output(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.resume:
        folders.refuse_occupied(folder, config.force)
    say(memory_line(config, device()))
    corpus = data.open_corpus(config, notify=notice)
    kind = _check_kind(config, corpus)
    goal = choose_goal(config, corpus, kind)
    tokenizer = None
    if config.chat == "model":  # its template renders the prompts
        tokenizer = models.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    examples = corpus.examples("train", kind, tokenizer)
    if not config.resume:
        config = choose(config, len(examples), say)
    arguments = training_arguments(config, folder)
    if dry_run:
        return {"status": "dry run", "output": str(folder), "rows": len(examples), "config": configuration.dump(config)}
    with folders.locked(folder), Signals() as signals, _explained(config, folder) as start:
        return _train(config, start, corpus, examples, goal, arguments, signals, say)


def _check_kind(config: RunConfig, corpus: data.Corpus) -> Kind:
    """The model's kind. Raises ConfigError when it cannot predict what the data ask for, before its weights are read."""
    found = models.load_config(config.model, trust_remote_code=config.trust_remote_code)
    kind = detect_kind(found, corpus.words is not None) if config.kind == "auto" else config.kind
    head_of(config.model, found, kind, trust_remote_code=config.trust_remote_code)
    _room(models.context_length(found), scheme_config(config).positions, config.max_length)
    return kind


@dataclass
class _Start:
    """One start of a run in its folder."""

    folder: Path
    begun: bool  # whether anything of it stands in the folder; until then a refusal leaves the folder as it was


@contextlib.contextmanager
def _explained(config: RunConfig, folder: Path) -> Iterator[_Start]:
    """Turn the ends that a run can meet into a sentence with an exit code, and note them in result.json."""
    start = _Start(folder, begun=config.resume)
    try:
        try:
            yield start
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            raise UserError(
                f"{error.strerror} while writing {error.filename or folder}: the steps made are kept in the journal or the "
                f"last checkpoint; make room and run `smidgen train --resume --output {folder}`"
            ) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MemoryRefused(_out_of_memory(config, error)) from error
        except RuntimeError as error:
            if "not enough memory" in str(error):
                raise MemoryRefused(_out_of_memory(config, error)) from error
            if "No space left" in str(error):
                raise UserError(str(error)) from error
            raise
    except UserError as error:
        status = {4: "diverged", 75: "interrupted"}.get(error.exit_code, "failed")
        with contextlib.suppress(OSError):
            if start.begun:
                folders.write_json(folder / folders.RESULT, {"status": status, "reason": str(error)})
            else:
                folders.withdraw(folder)
        raise


def _out_of_memory(config: RunConfig, error: BaseException) -> str:
    train = config.train
    half, twice = max(1, train.per_device_train_batch_size // 2), 2 * train.gradient_accumulation_steps
    first = (str(error).splitlines() or [type(error).__name__])[0]
    length = config.max_length or "all their"
    return (
        f"out of memory with {train.per_device_train_batch_size} rows of up to {length} tokens ({first}): "
        f"try --batch {half} train.gradient_accumulation_steps={twice}"
    )


class _Report(transformers.TrainerCallback):
    """metrics.jsonl and one console line a log step; ends the run when a signal came."""

    def __init__(self, folder: Path, signals: Signals, backward: bool, say: Say):
        self.folder, self.signals, self.backward, self.say = folder, signals, backward, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folders.rewind_metrics(self.folder, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = {k: v for k, v in (logs or {}).items() if k != "total_flos"}
        if "loss" in logs:
            logs["mem/peak_mb"] = round(memory.peak() / 2**20, 1)
        folders.append_metrics(self.folder, {"step": state.global_step, **logs})
        if "loss" in logs or any(k.startswith("eval_") for k in logs):
            self.say(f"step {state.global_step}/{state.max_steps}  " + line(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signals.received and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_evaluate = control.should_log = False
            control.should_save = self.backward


def line(logs: dict[str, Any]) -> str:
    """The measures of a log step that fit on a line."""
    measures = ("loss", *(f"eval_{name}" for name in ("loss", "accuracy", "f1", "exact_match")))
    shown = (*measures, "learning_rate", "grad_norm", "zo/projected_grad")
    return "  ".join(f"{k} {logs[k]:.4g}" for k in shown if isinstance(logs.get(k), (int, float)))


def _train(
    config: RunConfig,
    start: _Start,
    corpus: data.Corpus,
    examples: list[Any],
    goal: str,
    arguments: transformers.TrainingArguments,
    signals: Signals,
    say: Say,
) -> dict[str, Any]:
    folder = start.folder
    if config.resume:
        folders.explain_last_end(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    memory.warm_up()
    baseline = memory.resident()
    memory.reset_peak()
    classes = None if corpus.words is None else len(corpus.words)
    loaded = load(config, classes)
    adapted, tokenizer, kind = loaded.adapted, loaded.tokenizer, loaded.kind
    prepared = prepare(
        goal,
        examples,
        tokenizer,
        kind,
        name=corpus.name,
        max_length=config.max_length,
        context=loaded.context,
        position_ids=models.wants_position_ids(adapted.model),
        scoring=config.scoring,
    )
    policy, options = None, activations_config(config)
    if config.activations is not None:
        policy = activations.get(config.activations).build(adapted.model, options, view=adapted.view, seed=config.seed)
    rows = prepared.rows
    for remark in rows.notices:
        notice(remark)
    if config.max_length is None:
        say(f"max_length = {rows.max_length}  (95th percentile of the training rows, capped)")
        config = configuration.with_values(config, {"max_length": rows.max_length})
    names = {"dev": "validation"} | ({"test": "test"} if corpus.has("test") else {})
    splits = {name: evaluation_of(config, corpus, loaded, split) for name, split in names.items()}
    for name, split in splits.items():
        for remark in split.rows.notices:
            notice(f"{name}: {remark}")
    trainer = Trainer(
        model=adapted.model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=splits["dev"].rows,  # type: ignore[arg-type]
        data_collator=prepared.collator,
        processing_class=tokenizer,
        callbacks=[_Report(folder, signals, uses_backward(config.method), say)],
        method=config.method,
        preset=config.preset,
        method_args=options_of(config),
        kind=kind,
        view=adapted.view,
        fresh=adapted.fresh,
        moving=adapted if isinstance(adapted, Moving) else None,
        max_bad_steps=config.max_bad_steps,
        evaluation=splits["dev"],
        build=prepared.build,
        facts={"classes": classes},
        activations=policy,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # our lines instead
    trainer.create_optimizer()
    assert trainer.engine is not None
    trainer.engine.reuse.every = config.reuse
    if not config.resume:  # whatever can be refused has been
        start.begun = True
        if config.force:
            folders.clear(folder)
        folders.write_json(folder / folders.ENVIRONMENT, environment())
        folders.write_text(
            folder / folders.RESOLVED, configuration.dump(configuration.with_values(config, {"output": str(folder)}))
        )
    tuned, total = adapted.view.numel(), sum(p.numel() for p in adapted.model.parameters())
    steps = arguments.max_steps
    say(f"{config.method} on {tuned:,} of {total:,} weights ({kind}, {config.scheme}): {len(rows)} rows, {steps} steps")
    before = next((v["before"] for v in folders.metrics(folder) if "before" in v), None) if config.resume else None
    if before is None:
        before = trainer.measure(splits["dev"])
        folders.append_metrics(folder, {"step": 0, "before": before})
    say("before  " + line({f"eval_{k}": v for k, v in before.items()}))
    started, worked = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=True if config.resume else None)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    if signals.received and trainer.state.global_step < arguments.max_steps:
        raise Interrupted(
            f"stopped by {signals.received} after step {trainer.state.global_step}, nothing is lost: "
            f"go on with `smidgen train --resume --output {folder}`"
        )
    peak = memory.peak() - baseline
    trainer.save_state()
    after = {name: trainer.measure(split) for name, split in splits.items()}
    say("after   " + line({f"eval_{k}": v for k, v in after["dev"].items()}))
    folders.publish(adapted, tokenizer, folder)
    trainer.mark_end()
    engine = trainer.engine
    assert engine is not None
    result = {
        "status": "done",
        "metric": next(name for name in HEADLINES if name in before),
        "objective": goal,
        "before": before,
        **after,
        "steps": trainer.state.global_step,
        "bad_steps": engine.bad_steps,
        "forwards": engine.forwards,
        "backwards": engine.backwards,
        "tokens": engine.tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "tuned_weights": tuned,
        "weights": total,
        "kind": kind,
        "classes": classes,
        "weights_sha256": weights_sha256(adapted.view),
        "config_sha256": configuration.config_sha256(config),
        "versions": environment()["versions"],
        "output": str(folder),
    }
    folders.write_json(folder / folders.RESULT, result)
    folders.write_text(folder / folders.CARD, model_card(config, result))
    return result


def evaluation_of(
    config: RunConfig,
    corpus: data.Corpus,
    loaded: Loaded,
    split: str,
    *,
    batch_size: int | None = None,
    generated: bool = False,
) -> Evaluation:
    """A split of a corpus, ready to be measured with a model; generated: answers are generated even where the task has
    none of free text. Raises DataError and ConfigError as `smidgen.evaluate` does."""
    return evaluation(
        corpus,
        split,
        loaded.tokenizer,
        loaded.kind,
        max_length=min(loaded.context or _EVAL_LENGTH, max(config.max_length or 0, _EVAL_LENGTH)),
        context=loaded.context,
        batch_size=batch_size or config.train.per_device_eval_batch_size,
        position_ids=models.wants_position_ids(loaded.adapted.model),
        scoring=config.scoring,
        compared={"answer": False, "choice": True}.get(config.objective),
        generated=generated or config.objective in GENERATED,
    )


def environment() -> dict[str, Any]:
    """Versions and machine: env.json, and what a bug report needs."""
    names = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "numba", "numpy", "safetensors", "bitsandbytes")
    versions = {"smidgen": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
