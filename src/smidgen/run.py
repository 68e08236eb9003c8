"""One run from configuration to result: what `smidgen train` does, as a function."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from smidgen import activations, adapt, data, head_start, memory, models, optim, quantised, residence, world
from smidgen import config_file as configuration
from smidgen import folder as folders
from smidgen.best import Best, check_best
from smidgen.card import model_card
from smidgen.chat import FORMS, give_form
from smidgen.config import ConfigError, Interrupted, RunConfig, notice
from smidgen.endings import Start, explained
from smidgen.environment import environment
from smidgen.evaluate import HEADLINES, Evaluation, evaluation
from smidgen.exhausted import check
from smidgen.goal import GENERATED, choose_goal, failed, packable, prepare, reward_of, settled
from smidgen.kinds import Kind, detect_kind, head_of
from smidgen.moving import Moving
from smidgen.pairs import PairEvaluation
from smidgen.params import canonical
from smidgen.pixels import check_rows, name_classes
from smidgen.progress import Progress, Say, line, say_aloud, silent
from smidgen.provenance import weights_sha256
from smidgen.settings import (
    activations_config,
    check_places,
    check_quantise,
    check_start,
    choose,
    count_rows,
    filled,
    memory_line,
    options_of,
    room,
    same_rows,
    scheme_config,
    tokenizer_of,
    training_arguments,
)
from smidgen.signals import Signals
from smidgen.trainer import Trainer, method_config

_EVAL_LENGTH = 1024  # tokens of a row in evaluation, unless training asks for more; chosen


@dataclass
class Loaded:
    """A model under its scheme, ready to be tuned."""

    adapted: Any  # an `Adapted` of smidgen.adapt
    tokenizer: Any
    kind: Kind
    context: int | None
    asked: Kind | None = None  # of a readout: the kind whose prompts it reads; None: the raw text
    drawn: Sequence[str] = ()  # tensors that the checkpoint did not hold


def device() -> str:
    """Where a run computes: the first CUDA device, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(config: RunConfig, classes: int | None, folder: Path | None = None) -> Loaded:
    """The model of a configuration under its scheme; classes: of labelled rows, else None; folder: of the run, where
    weights that stay on disk lie, None: all are in memory. Raises ConfigError."""
    options = scheme_config(config)
    model, tokenizer, kind = models.load_model(
        config.model,
        config.kind,
        config.dtype,
        classes,
        seed=config.seed % 2**63,
        quantise=config.quantise,
        own_tokenizer=config.tokenizer,
        trust_remote_code=config.trust_remote_code,
        **residence.loading(config, folder, device()),
    )
    residence.settle(config, model, folder, device())
    if config.chat in FORMS:
        give_form(tokenizer, config.chat)
    limit = models.context_length(model.config, tokenizer if kind != "image" else None)
    context = room(limit, options.positions, config.max_length)
    scheme = adapt.get(config.scheme)
    drawn = [canonical(n) for n in models.fresh_parameters(model)]
    kind, asked = head_start.prepare(config, model, tokenizer, kind)
    more = {"classes": classes} if head_start.fitted(config.scheme) else {}
    adapted = scheme.build(model, options, seed=config.seed % 2**63, fresh=drawn, **more)
    return Loaded(adapted, tokenizer, kind, context, asked, drawn)


def finetune(config: RunConfig, *, dry_run: bool = False, test: bool = True, say: Say = say_aloud) -> dict[str, Any]:
    """Train as configured and return the content of result.json. Everything that can be refused is refused before the
    folder is touched. test: whether the test rows are read, once, at the end: a trial of a search leaves them alone.
    On several ranks of torch.distributed each process calls this; rank 0 writes the folder. Raises UserError, whose
    `exit_code` is the command's."""
    world.join(float(config.train.extra.get("ddp_timeout", world.TIMEOUT)))
    if not world.leads():
        say = silent
    world.agree({"configuration": configuration.dump(config)})
    if world.restarted() and not config.resume and folders.left_by(config):
        if (found := folders.done(Path(str(config.output)))) is not None:
            return found  # it was whole when a process failed
        config = configuration.with_values(config, {"resume": True})
    if world.count() > 1 and config.output is None:
        raise ConfigError(f"{world.count()} ranks write one run: name its folder, which all of them see, with --output")
    config = folders.resumed(config) if config.resume else filled(config, say)
    if config.resume:
        config = same_rows(config, Path(str(config.output)))
    scheme_config(config)
    check_quantise(config)
    check_places(config)
    check_start(config)
    activations_config(config)
    method_config(config.method, config.preset, config.method_args)
    reward_of(config)
    folder = Path(config.output) if config.output else folders.default_output(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.resume and world.leads():
        folders.refuse_occupied(folder, config.force)
    say(memory_line(config, device()))
    corpus = data.open_corpus(config, notify=notice)
    kind, asked = head_start.shown(config, _check_kind(config, corpus))
    corpus = head_start.prompted(corpus, asked)
    goal = choose_goal(config, corpus, kind)
    head_start.refuse(config, corpus, goal)
    packed = packable(config, goal, kind, scheme_config(config).positions)
    tokenizer = tokenizer_of(config) if config.chat == "model" else None  # its template renders the prompts
    examples: Any = corpus.examples("train", kind, tokenizer) if packed != "stream" else corpus.training_texts()
    if not config.resume:
        config = choose(config, count_rows(config, examples, packed), say)
    arguments = training_arguments(config, folder)
    check(config, corpus, device(), say)
    if dry_run:
        rows = "unknown" if config.streaming else len(examples)
        return {"status": "dry run", "output": str(folder), "rows": rows, "config": configuration.dump(config)}
    with folders.locked(folder) if world.leads() else contextlib.nullcontext(), Signals() as signals:
        world.traffic.asked = lambda: signals.received is not None
        world.from_first([])  # the others go on once the folder is rank 0's
        with explained(config, folder, device()) as start, world.together():
            return _train(config, start, corpus, examples, goal, arguments, test, signals, say)


def _check_kind(config: RunConfig, corpus: data.Corpus) -> Kind:
    """The model's kind. Raises ConfigError when it cannot predict what the data ask for, before its weights are read."""
    found = models.load_config(config.model, config.tokenizer, trust_remote_code=config.trust_remote_code)
    kind = detect_kind(found, corpus.words is not None) if config.kind == "auto" else config.kind
    head_of(config.model, found, kind, trust_remote_code=config.trust_remote_code)
    check_rows(config, corpus.name, corpus.pictures, kind)
    room(models.context_length(found), scheme_config(config).positions, config.max_length)
    return kind


def _train(
    config: RunConfig,
    start: Start,
    corpus: data.Corpus,
    examples: Any,
    goal: str,
    arguments: transformers.TrainingArguments,
    test: bool,
    signals: Signals,
    say: Say,
) -> dict[str, Any]:
    folder = start.folder
    if config.resume and world.leads():
        folders.explain_last_end(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    memory.warm_up()
    baseline = memory.resident()
    memory.reset_peak()
    classes = None if corpus.words is None else len(corpus.words)
    loaded = load(config, classes, folder)
    adapted, tokenizer, kind = loaded.adapted, loaded.tokenizer, loaded.kind
    named = name_classes(adapted.model, corpus.words or ()) if kind == "image" else {}
    moving = adapted if isinstance(adapted, Moving) else None
    if config.best and world.count() > 1:
        raise ConfigError(f"best = true is for one process, and these are {world.count()} ranks: leave best out")
    if config.best:
        addends = any(e.addend for e in adapted.view)
        check_best(config.method, optim.get(config.method).build.lazy, moving is not None, addends)
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
        packed=config.packing,
        beta=corpus.beta,
        reward=reward_of(config),
        penalty=config.base_penalty,
        new_tokens=config.max_new_tokens,
    )
    prepared = settled(prepared, adapted.model, adapted.view, kind, config.train.per_device_eval_batch_size)
    policy, options = None, activations_config(config)
    if config.activations is not None:
        policy = activations.get(config.activations).build(adapted.model, options, view=adapted.view, seed=config.seed)
    rows = prepared.rows
    for remark in rows.notices:
        notice(remark)
    if config.max_length is None and kind != "image":
        how = "what the model has room for, capped" if config.packing else "95th percentile of the training rows, capped"
        say(f"max_length = {rows.max_length}  ({how})")
        config = configuration.with_values(config, {"max_length": rows.max_length})
    names = {"dev": "validation"} | ({"test": "test"} if test and corpus.has("test") else {})
    splits = {name: evaluation_of(config, corpus, loaded, split) for name, split in names.items()}
    for name, split in splits.items():
        for remark in split.rows.notices:
            notice(f"{name}: {remark}")
    saves = not optim.get(config.method).build.replayable(method_config(config.method, config.preset, options_of(config)))
    trainer = Trainer(
        model=adapted.model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=splits["dev"].rows,  # type: ignore[arg-type]
        data_collator=prepared.collator,
        processing_class=tokenizer,
        callbacks=[Progress(folder, signals, saves, say)],
        method=config.method,
        preset=config.preset,
        method_args=options_of(config),
        kind=kind,
        view=adapted.view,
        fresh=adapted.fresh,
        moving=moving,
        max_bad_steps=config.max_bad_steps,
        evaluation=splits["dev"],
        build=prepared.build,
        facts={"classes": classes},
        activations=policy,
        probe_ranks=config.probe_ranks,
        check_ranks=config.check_ranks,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # our lines instead
    trainer.create_optimizer()
    assert trainer.engine is not None
    trainer.engine.reuse.every = config.reuse
    trainer.engine.group = config.probes_at_once
    if not config.cuda_graphs:
        trainer.engine.graphs = None
    if not config.resume:  # whatever can be refused has been
        start.begun = True
        if world.leads():
            if config.force:
                folders.clear(folder)
            folders.write_json(folder / folders.ENVIRONMENT, environment())
            written = configuration.dump(configuration.with_values(config, {"output": str(folder)}))
            folders.write_text(folder / folders.RESOLVED, written)
    tuned, total = adapted.view.numel(), quantised.numel(adapted.model)
    steps, count = arguments.max_steps, "streamed" if config.streaming else len(rows)  # type: ignore[arg-type]
    say(f"{config.method} on {tuned:,} of {total:,} weights ({kind}, {config.scheme}): {count} rows, {steps} steps")
    before = next((v["before"] for v in folders.metrics(folder) if "before" in v), None) if config.resume else None
    if not world.from_first([before is not None])[0]:
        before = trainer.measure(splits["dev"])
        if world.leads():
            folders.append_metrics(folder, {"step": 0, "before": before})
    before = before or {}  # a rank that does not see the folder writes nothing
    say("before  " + line({f"eval_{k}": v for k, v in before.items()}))
    metric = next((name for name in HEADLINES if name in before), "loss")
    best = Best(folder, adapted.view, metric, lambda: trainer.engine.forwards) if config.best else None  # type: ignore[union-attr]
    if best is not None:
        trainer.add_callback(best)
        if not config.resume:
            best.look(0, before)
    started, worked = time.perf_counter(), time.process_time()
    first = head_start.begin(config, trainer, loaded, prepared, corpus, splits["dev"], say)
    begun = (folder / folders.JOURNAL).exists() or not trainer.journalled  # else it ended before its first step
    trainer.train(resume_from_checkpoint=True if config.resume and begun else None)
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
    if world.leads():
        folders.publish(adapted, tokenizer, folder)
        trainer.mark_end()
    engine, sha256 = trainer.engine, weights_sha256(adapted.view)
    assert engine is not None
    if best is not None:
        best.look(trainer.state.global_step, after["dev"])
        measured = best.figures((lambda: trainer.measure(splits["test"])) if "test" in splits else None)
        say(f"best    step {measured['step']}  " + line({f"eval_{k}": v for k, v in measured["dev"].items()}))
    result = {
        "status": "done",
        "metric": metric,
        "objective": goal,
        "before": before,
        **first,
        **after,
        **({} if best is None else {"best": measured}),
        "steps": trainer.state.global_step,
        "bad_steps": engine.bad_steps,
        **({} if config.reward is None else {"reward_failed": failed(folder)}),
        "forwards": engine.forwards,
        "evaluation_forwards": trainer.looks,
        "backwards": engine.backwards,
        "tokens": engine.tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "tuned_weights": tuned,
        "weights": total,
        "kind": kind,
        "classes": classes,
        **named,
        "weights_sha256": sha256,
        "data": {}
        if config.streaming
        else {"train": _rows_of(corpus, "train", len(examples))}
        | {name: _rows_of(corpus, split, len(splits[name].rows), splits[name]) for name, split in names.items()},
        "config_sha256": configuration.config_sha256(config),
        "versions": environment()["versions"],
        "output": str(folder),
    }
    if world.leads():
        folders.write_json(folder / folders.RESULT, result)
        folders.write_text(folder / folders.CARD, model_card(config, result))
    return result


def _rows_of(corpus: data.Corpus, split: str, rows: int, measured: Any = None) -> dict[str, Any]:
    """What a result says of a split: its rows, what identifies them, and how often the commonest answer is right."""
    golds = getattr(measured, "golds", None)
    found = {"rows": len(golds) if golds else rows, "sha256": corpus.fingerprint(split)}
    return found | ({"majority": max(Counter(golds).values()) / len(golds)} if golds else {})


def evaluation_of(
    config: RunConfig,
    corpus: data.Corpus,
    loaded: Loaded,
    split: str,
    *,
    batch_size: int | None = None,
    generated: bool = False,
    reference: Loaded | None = None,
) -> Evaluation | PairEvaluation:
    """A split of a corpus, ready to be measured with a model; generated: answers are generated even where the task has
    none of free text; reference: of pairs, None: the model as it is. Raises DataError and ConfigError as `smidgen.evaluate`
    does."""
    found = evaluation(
        head_start.prompted(corpus, loaded.asked),
        split,
        loaded.tokenizer,
        loaded.kind,
        max_length=min(loaded.context or _EVAL_LENGTH, max(config.max_length or 0, _EVAL_LENGTH)),
        context=loaded.context,
        batch_size=batch_size or config.train.per_device_eval_batch_size,
        position_ids=models.wants_position_ids(loaded.adapted.model),
        scoring=config.scoring,
        compared={"answer": False, "choice": True, "hinge": True}.get(config.objective),
        generated=generated or config.objective in GENERATED,
        new_tokens=config.max_new_tokens,
        reward=reward_of(config),
        stream=config.max_length if config.packing == "stream" else None,
    )
    if isinstance(found, PairEvaluation):
        start = (reference or loaded).adapted
        found.refer(start.model, start.view, loaded.kind)
    return found
