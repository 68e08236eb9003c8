"""Every method inside `transformers.Trainer`: the mixin, the factory for other trainers, and smidgen's own Trainer.

The loop is Trainer's: epochs, schedules, callbacks, checkpoints, data order, trackers and the hub are untouched. The
mixin replaces one thing, `training_step`: micro-batches are collected, and on the last one of an optimizer step the
method is asked for one `step(objective)`. The call of `optimizer.step()` that Trainer makes afterwards does nothing.

Methods without back-propagation write a journal. Resuming is Trainer's own resume, from its last checkpoint or from
the start, with recorded numbers in place of forward passes until the journal ends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from smidgen import journal, optim, quantised, world
from smidgen.batched import BatchedEngine
from smidgen.called import CalledObjective
from smidgen.config import ConfigError, Diverged, notice
from smidgen.folder import JOURNAL
from smidgen.layerwise import engine_of
from smidgen.method_options import method_config, optimizer_class, uses_backward
from smidgen.moving import MovingMixin
from smidgen.objective import ModelObjective, Objective, Recorded, Replayed
from smidgen.optim._optimizer import Optimizer
from smidgen.parallel import Parallel
from smidgen.params import ParamView
from smidgen.probing import Batch, Engine
from smidgen.provenance import check_header, header, init_sha256, load_init, save_init

log = logging.getLogger("smidgen")


class ForwardOnlyMixin:
    """Put before a `transformers.Trainer` class. Extra arguments:

    method, preset, method_args: which method and its options; `learning_rate` of the training arguments wins over
    `lr` only where it was set by `method_args` neither;
    kind: how labels meet logits, for smidgen's own loss;
    own_loss: False calls the trainer's `compute_loss` unchanged;
    view, fresh: the tuned tensors (default: all with requires_grad), and the names of those that are not in the base;
    max_bad_steps: bad steps in a row before the run ends as diverged;
    facts: further entries of the journal's header;
    probe_ranks, check_ranks: of several ranks, see `smidgen.parallel.Parallel`;
    activations: a policy of `smidgen.activations` in the model: its vectors go into checkpoints and come back on resume.
    """

    method = "zo_sgd"
    preset: str | None = None
    method_args: dict[str, Any] = {}
    own_loss = False
    build: Callable[[Engine, list[Batch]], Any] | None = None

    def __init__(
        self,
        *args: Any,
        method: str | None = None,
        preset: str | None = None,
        method_args: dict[str, Any] | None = None,
        kind: Any = "causal",
        view: ParamView | None = None,
        fresh: Iterable[str] | None = None,
        max_bad_steps: int = 20,
        facts: Mapping[str, Any] | None = None,
        activations: Any = None,
        probe_ranks: int = 1,
        check_ranks: int = 100,
        **kwargs: Any,
    ):
        self.method = method or self.method
        self.backward = uses_backward(self.method)
        given = kwargs.get("model", args[0] if args else None)
        if self.backward and (view is None or any(e.addend for e in view)):
            quantised.refuse_backward(self.method, given)
        with quantised.admitted(given):
            super().__init__(*args, **kwargs)
        training = self.args  # type: ignore[attr-defined]
        options = {"seed": training.seed, **self.method_args, **(method_args or {})}
        if "lr" not in options and (preset or self.preset) is None and training.learning_rate != _default_lr():
            options["lr"] = training.learning_rate
        self.method_config = method_config(self.method, preset or self.preset, options)
        training.learning_rate = self.method_config.lr
        self.journalled = optimizer_class(optim.get(self.method)).replayable(self.method_config)
        if training.fp16:
            raise ConfigError("fp16=True scales gradients, which these methods do not have: use bf16=True or float16 weights")
        if training.n_gpu > 1:
            raise ConfigError(f"{training.n_gpu} GPUs in one process: start with torchrun, or set CUDA_VISIBLE_DEVICES to one")
        if training.load_best_model_at_end and optimizer_class(optim.get(self.method)).lazy:
            raise ConfigError(
                f"load_best_model_at_end puts back weights without what {self.method} has not merged into them: keep "
                "checkpoints with save_steps and rebuild the best step with `smidgen replay --at STEP`"
            )
        training.max_grad_norm = 0.0  # clipping belongs to the method
        training.logging_nan_inf_filter = False  # a NaN is shown as a NaN
        training.average_tokens_across_devices &= not self.own_loss  # ours counts by itself, in the same exchange
        self.kind, self._view, self._fresh, self.max_bad_steps, self._facts = kind, view, fresh, max_bad_steps, facts
        self._activations = activations
        self.parallel = Parallel(probe_ranks, check_ranks)
        self.parallel.begin(self)
        self.engine: BatchedEngine | None = None
        self._micro: list[Batch] = []
        self._checked = False
        self._past: list[journal.Record] = []
        self._writer: journal.Witness | None = None

    # -- set-up -------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's optimizer over the tuned tensors, and the probing engine."""
        if self.optimizer is None:  # type: ignore[has-type]
            model = self.model  # type: ignore[attr-defined]
            view = self._view or ParamView.of_model(model)
            self.optimizer = optimizer_class(optim.get(self.method))(view, self.method_config)  # type: ignore[call-arg]
            self.engine = engine_of(model, view, self.kind)
            if not self._wrapped(view):  # no gradient buckets: they would cost a copy of the weights
                prepare = self.accelerator.prepare_model  # type: ignore[attr-defined]
                self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)  # type: ignore[attr-defined]
        return self.optimizer

    def _wrapped(self, view: ParamView) -> bool:
        """Whether accelerate may wrap the model: for back-propagation alone, through tensors that have their gradient whole."""
        alone = optimizer_class(optim.get(self.method)).uses == {"backward"}
        return alone and all(e.support is None for e in view)

    @property
    def stepper(self) -> Optimizer:
        """The method itself, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As Trainer's. With `resume_from_checkpoint=True` and a journal in the output folder the run goes on from the
        journal's last whole step."""
        resume = resume_from_checkpoint
        if self.journalled:
            self.create_optimizer()
            resume = self._open_journal(resume)
        else:
            resume = _checkpoint(Path(self.args.output_dir), sys.maxsize, None) if resume is True else resume  # type: ignore[attr-defined]
            if self.parallel.count > 1:
                self.parallel.agree_on(self, None)
        if self._activations is not None and resume:
            self._activations.load(Path(resume))
        try:
            none = self.args.max_steps == 0  # type: ignore[attr-defined] # transformers would take it for "not given"
            output = None if none else super().train(resume_from_checkpoint=resume, **kwargs)  # type: ignore[misc]
            self.stepper.merge_()
            return output
        finally:
            if self._writer is not None:
                self._writer.close()

    def _open_journal(self, resume: Any) -> str | None:
        """Create the journal, or read it and choose the checkpoint to start from."""
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        path = folder / JOURNAL
        view, device = self.stepper.view, self.args.device  # type: ignore[attr-defined]
        leader = world.leads()
        model = self.model  # type: ignore[attr-defined]
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = self._fresh if self._fresh is not None else (view.entries if hasattr(model, "peft_config") else ())
            init = init_sha256(view, list(fresh)) if fresh else None
            base = self.parallel.agree_on(self, init)
            self._writer = journal.Witness()
            if leader:
                if fresh:
                    save_init(view, list(fresh), folder)
                head = header(self.method, self.method_config, view, base, init, device, self._facts)
                self._writer = journal.Writer.create(path, head)
            return None
        if not path.exists():
            raise ConfigError(f"nothing to resume: {path} does not exist")
        transcript = journal.read(path)
        init = load_init(view, folder)
        base = self.parallel.agree_on(self, init, ("transcript", journal.Witness(transcript.steps()).sha256))
        ours = header(self.method, self.method_config, view, base, init, device, self._facts)
        check_header(transcript.header, ours, path)
        if (line := transcript.cut_notice()) is not None:
            notice(line)
        self._past = transcript.steps()
        self._writer = journal.Writer.resume(transcript) if leader else journal.Witness(self._past)
        wanted = resume if isinstance(resume, (str, os.PathLike)) else None
        return _checkpoint(folder, len(self._past), None if wanted is None else Path(wanted))

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Collect a micro-batch; on the last one make the step."""
        self._micro.append(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        device = self.args.device  # type: ignore[attr-defined]
        if not self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            return torch.zeros((), device=device)
        batches, self._micro = self._micro, []
        if model.training and not self.backward:
            model.eval()
        if model is not self.model and self.engine is not None:  # type: ignore[attr-defined]
            self.engine.wrapped = model
        loss = self._one_step(batches, num_items_in_batch)
        return torch.tensor(loss, device=device)

    def _one_step(self, batches: list[Batch], items: Any) -> float:
        opt, t, engine = self.stepper, self.state.global_step, self.engine  # type: ignore[attr-defined]
        assert engine is not None
        for name, count in opt.spent.items():
            setattr(engine, name, count)
        if t < len(self._past):
            record = self._past[t]
            lrs = tuple(g["lr"] for g in opt.param_groups)
            if record.lrs != lrs:
                raise ConfigError(
                    f"the journal's step {t} has learning rate {record.lrs[0]}, this run {lrs[0]}: resume unchanged"
                )
            replayed = Replayed(record.values)
            loss = opt.step(replayed)  # its forwards were made by the first start, for this run
            engine.forwards += replayed.forwards * len(batches)
            engine.jvps += replayed.jvps * len(batches)
            engine.tokens += replayed.forwards * sum(b["input_ids"].numel() for b in batches if "input_ids" in b)
        elif not self.journalled:
            loss = opt.step(self._objective(batches, items))
        else:
            recorded = Recorded(self._objective(batches, items))
            loss = opt.step(recorded)
            assert opt.outcome is not None
            if self._writer is not None:
                flags = 0 if opt.outcome.written else journal.BAD
                self._writer.append([g["lr"] for g in opt.param_groups], recorded.values, flags)
        assert opt.outcome is not None
        if t >= len(self._past):
            self.parallel.check(t + 1, opt.view, self._writer, last=t + 1 == self.state.max_steps)  # type: ignore[attr-defined]
        engine.bad_steps += not opt.outcome.written
        opt.spent = {name: getattr(engine, name) for name in ("forwards", "tokens", "backwards", "jvps", "bad_steps")}
        if opt.bad_steps >= self.max_bad_steps:
            raise Diverged(
                f"{opt.bad_steps} steps in a row had no finite loss (the last is step {t}): "
                "lower the learning rate or eps, or use float32; the run folder holds the weights' journal up to there"
            )
        assert loss is not None
        return loss

    def _objective(self, batches: list[Batch], items: Any) -> Objective:
        engine = self.engine
        assert engine is not None
        inner: Any
        if self.build is not None:
            inner = self.build(engine, batches)
        elif self.own_loss:
            inner = ModelObjective(engine, batches)
        else:
            scaled = items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)  # type: ignore[attr-defined]

            def called(batch: Batch) -> Tensor:
                with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    return self.compute_loss(self.model, dict(batch), num_items_in_batch=items)  # type: ignore[attr-defined]

            if not self._checked:
                engine.check(lambda: called(batches[0]))
            self._checked = True
            inner = CalledObjective(engine, batches, called, scaled=scaled)
        return self.parallel.objective(inner)

    # -- what Trainer reports -----------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        outcome = self.stepper.outcome
        return None if outcome is None or outcome.measures is None else outcome.measures.get("grad_norm")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log line plus the method's measures and the forwards made so far."""
        if "loss" in logs and self.engine is not None:
            outcome = self.stepper.outcome
            if outcome is not None and outcome.measures:
                logs.update({k: v for k, v in outcome.measures.items() if k != "grad_norm"})
            if not self.backward:
                logs["zo/forwards"] = self.engine.forwards
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, at theta."""
        offset = self.stepper.offset() if self.engine is not None else ()
        with contextlib.nullcontext() if not offset else self.engine.displaced(offset):  # type: ignore[union-attr]
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._writer is not None:
            self._writer.sync()  # a checkpoint never stands ahead of the journal
        if self._activations is not None:
            self._activations.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")  # type: ignore[attr-defined]
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]


def _default_lr() -> float:
    """The learning rate of training arguments that nobody touched."""
    return transformers.TrainingArguments.__dataclass_fields__["learning_rate"].default  # type: ignore[return-value]


def _checkpoint(folder: Path, steps: int, wanted: Path | None) -> str | None:
    """The last whole checkpoint that the journal reaches, or the one that was asked for, or None for the start."""
    if wanted is not None:
        return str(wanted)
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / "trainer_state.json").exists() and not (path / "checkpoint-is-incomplete.txt").exists():
            found[int(number)] = path
    usable = [n for n in found if n <= steps]
    return str(found[max(usable)]) if usable else None


def forward_only(trainer: type, method: str = "zo_sgd", *, preset: str | None = None, **options: Any) -> type:
    """A subclass of any `transformers.Trainer` that trains with a method of ours and keeps the trainer's own loss.

    >>> from trl import SFTTrainer  # doctest: +SKIP
    >>> Trainer = smidgen.forward_only(SFTTrainer, method="zo_sgd", lr=1e-6)  # doctest: +SKIP
    """
    if uses_backward(method):
        raise ConfigError(f"{method} uses back-propagation: use {trainer.__name__} as it is")
    if "slope" in optimizer_class(optim.get(method)).uses:
        raise ConfigError(f"{method} differentiates smidgen's own loss, not that of {trainer.__name__}: use smidgen.Trainer")
    method_config(method, preset, options)
    attributes = {"method": method, "preset": preset, "method_args": options, "own_loss": False, "__doc__": trainer.__doc__}
    return type(f"ForwardOnly{trainer.__name__}", (ForwardOnlyMixin, trainer), attributes)


class Trainer(MovingMixin, ForwardOnlyMixin, transformers.Trainer):  # type: ignore[misc]
    """The Trainer of a run: every method, our loss at label positions only, our evaluation.

    `evaluation` maps a dataset to metrics (see `smidgen.evaluate`); by default only the loss is computed. `build` makes a
    step's objective of its engine and micro-batches; by default the loss of the rows.
    """

    own_loss = True

    def __init__(self, *args: Any, evaluation: Any = None, build: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._evaluation, self.build = evaluation, build
        self.looks = 0  # forwards of evaluations so far
        self._measured: dict[int, tuple[Any, dict[str, float]]] = {}

    def measure(self, evaluation: Callable[..., dict[str, float]]) -> dict[str, float]:
        """An evaluation at theta + offset, made once a step; its forwards are not counted as the run's."""
        self.create_optimizer()
        assert self.engine is not None
        step = self.stepper.t, sum(entry.version for entry in self.stepper.view)
        if self._measured.get(id(evaluation), (None, None))[0] == step:
            return self._measured[id(evaluation)][1]
        counted = self.engine.forwards, self.engine.tokens
        try:
            with self.resting():
                found = evaluation(self.engine, self.stepper.offset())
            found = dict(zip(found, world.from_first(list(found.values())), strict=True))  # what all ranks decide by
            self._measured[id(evaluation)] = (step, found)
            return found
        finally:
            self.looks += self.engine.forwards - counted[0]
            self.engine.forwards, self.engine.tokens = counted

    def mark_end(self) -> None:
        """Write into the journal that the run ended by itself."""
        if isinstance(self._writer, journal.Writer):
            with journal.Writer.resume(journal.read(self._writer.path)) as writer:
                writer.end()

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Token-weighted loss, and the task's metric where rows have answers, at theta + offset."""
        assert self.engine is not None
        if self._evaluation is None:
            raise ConfigError("this Trainer has no evaluation: pass evaluation=, or set eval_strategy='no'")
        found = self.measure(self._evaluation)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
