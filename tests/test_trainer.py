"""The mixin on transformers' and trl's trainers: steps, accumulation, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

import smidgen
from families import make
from smidgen import journal
from smidgen.config import ConfigError, Diverged
from smidgen.trainer import ForwardOnlyMixin, forward_only, method_config

pytestmark = pytest.mark.trainer


class Rows(torch.utils.data.Dataset):
    """24 rows of 8 tokens with labels on the last three."""

    def __init__(self, rows=24):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 97, (rows, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: 5 - i % 3] = -100
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": labels}


def arguments(folder: Path, **options):
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
    }
    return tf.TrainingArguments(
        **{**values, "disable_tqdm": True, "use_cpu": True, "logging_steps": 2, "learning_rate": 1e-4, **options}
    )


class Interrupt(tf.TrainerCallback):
    """Raises after a step, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(folder, *, method="zo_sgd", trainer=None, resume=None, stop=None, method_args=None, **options):
    _, model = make("llama-tied")
    cls = trainer or smidgen.Trainer
    callbacks = [Interrupt(stop)] if stop else None
    t = cls(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Rows(),
        method=method,
        method_args=method_args,
        callbacks=callbacks,
    )
    if stop:
        with pytest.raises(KeyboardInterrupt):
            t.train(resume_from_checkpoint=resume)
    else:
        t.train(resume_from_checkpoint=resume)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, t


def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


class Plain(ForwardOnlyMixin, tf.Trainer):
    """The mixin over Trainer's own loss."""


@pytest.mark.parametrize("trainer", [smidgen.Trainer, Plain])
def test_a_run_trains_and_writes_one_record_a_step(tmp_path, trainer):
    weights, t = run(tmp_path, trainer=trainer)
    _, start = make("llama-tied")
    assert not equal(weights, dict(start.named_parameters()))
    found = journal.read(tmp_path / "journal.bin")
    assert len(found.steps()) == 8 and {len(r.values) for r in found.steps()} == {2}
    assert t.engine.forwards == 16
    logs = [h for h in t.state.log_history if "loss" in h]
    assert all("zo/projected_grad" in h and "grad_norm" not in h for h in logs)


def test_own_loss_and_trainers_loss_agree(tmp_path):
    one, _ = run(tmp_path / "a", trainer=smidgen.Trainer)
    two, _ = run(tmp_path / "b", trainer=Plain)
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


def test_accumulation_equals_the_whole_batch(tmp_path):
    whole, _ = run(tmp_path / "a", per_device_train_batch_size=4)
    split, _ = run(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert all(torch.allclose(whole[n], split[n], atol=1e-5) for n in whole)


@pytest.mark.parametrize("method", ["zo_sgd", "adamw"])
@pytest.mark.parametrize("save", [None, 3])
def test_resume_in_mid_epoch_is_bit_equal(tmp_path, method, save):
    if method == "adamw" and save is None:
        pytest.skip("a method with back-propagation resumes from a checkpoint")
    saving = {} if save is None else {"save_strategy": "steps", "save_steps": save}
    schedule = {"lr_scheduler_type": "linear", "max_steps": 14, **saving}
    straight, _ = run(tmp_path / "a", method=method, **schedule)
    run(tmp_path / "b", method=method, stop=8, **schedule)
    resumed, t = run(tmp_path / "b", method=method, resume=True, **schedule)
    assert equal(straight, resumed)
    if method == "zo_sgd":
        assert t.engine.forwards == 14 * 2  # of the whole run, replayed steps included
        assert (tmp_path / "a" / "journal.bin").read_bytes() == (tmp_path / "b" / "journal.bin").read_bytes()


def test_resume_refuses_other_settings_and_another_base(tmp_path):
    run(tmp_path, stop=4)
    with pytest.raises(ConfigError, match=r"eps: 0\.001 -> 0\.01"):
        run(tmp_path, resume=True, method_args={"eps": 1e-2})
    with pytest.raises(ConfigError, match="learning rate"):
        run(tmp_path, resume=True, lr_scheduler_type="constant")
    _, other = make("llama-tied", seed=1)
    t = smidgen.Trainer(model=other, args=arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(ConfigError, match="another base model"):
        t.train(resume_from_checkpoint=True)
    with pytest.raises(journal.JournalError, match="exists"):
        run(tmp_path)


def test_sft_trainer_keeps_its_loss_and_its_head_is_displaced(tmp_path):
    """trl multiplies hidden states by `lm_head.weight` without calling the head."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def build(folder, **options):
        _, model = make("llama-untied")
        rows = Dataset.from_list(
            [{"input_ids": r["input_ids"].tolist(), "labels": r["labels"].tolist()} for r in (Rows()[i] for i in range(24))]
        )
        config = trl.SFTConfig(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, max_length=None, **options,
        )  # fmt: skip
        cls = forward_only(trl.SFTTrainer, method="zo_sgd", lr=1e-4)
        return model, cls(model=model, args=config, train_dataset=rows, processing_class=_tokenizer(tmp_path))

    model, t = build(tmp_path / "a")
    head = model.lm_head.weight.detach().clone()
    t.train()
    assert not torch.equal(head, model.lm_head.weight)
    record = journal.read(tmp_path / "a" / "journal.bin").steps()[0]
    assert record.values[0] != record.values[1]
    readers = {r.name: [a for e, _, a in r.tensors if e.name == "lm_head.weight"] for r in t.engine.readers}
    assert readers[""] == ["weight"]
    # the slope that was recorded is that of a plainly displaced copy under trl's own loss
    twin, other = build(tmp_path / "b")
    other.create_optimizer()
    from smidgen.directions import Dense, displace

    ids = other.stepper.view.ids
    inputs = next(iter(other.get_train_dataloader()))
    items = int((inputs["labels"][:, 1:] != -100).sum())
    for sign, value in zip((1, -1), record.values, strict=True):
        copied = {n: p.detach().clone() for n, p in twin.named_parameters()}
        z = Dense(other.method_config.seed, 0, 0, ids)
        for entry in other.stepper.view:
            displace(((z, sign * 1e-3),), entry.name, copied[entry.name], entry.storage)
        with torch.no_grad():
            loss = other.compute_loss(twin.eval(), dict(inputs), num_items_in_batch=torch.tensor(items))
        for name, parameter in twin.named_parameters():
            parameter.data.copy_(copied[name])
        assert abs(float(loss) - value) < 1e-6


def _tokenizer(folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    core = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", bos_token="w2")


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fp16"):
        run(tmp_path, fp16=True, use_cpu=True)
    with pytest.raises(ConfigError, match="did you mean 'zo_sgd'"):
        method_config("zo_sdg", None, {})
    with pytest.raises(ConfigError, match="did you mean 'queries'"):
        method_config("zo_sgd", None, {"querys": 2})
    with pytest.raises(ConfigError, match="eps"):
        method_config("zo_sgd", None, {"eps": -1})
    with pytest.raises(ConfigError, match="preset"):
        method_config("zo_sgd", "mezzo", {})
    with pytest.raises(ConfigError, match="back-propagation"):
        forward_only(tf.Trainer, method="adamw")


def test_divergence_ends_the_run_and_bad_steps_are_journalled(tmp_path):
    _, model = make("llama-tied")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    t = smidgen.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), max_bad_steps=3)
    with pytest.raises(Diverged, match="3 steps in a row"):
        t.train()
    found = journal.read(tmp_path / "journal.bin").steps()
    assert [r.flags for r in found] == [journal.BAD] * 3


def test_learning_rate_comes_from_the_training_arguments_unless_given(tmp_path):
    _, model = make("llama-tied")
    t = smidgen.Trainer(model=model, args=arguments(tmp_path, learning_rate=3e-4), train_dataset=Rows())
    assert t.method_config.lr == 3e-4
    t = smidgen.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), method_args={"lr": 2e-6})
    assert t.method_config.lr == 2e-6 and t.args.learning_rate == 2e-6
    untouched = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert smidgen.Trainer(model=model, args=untouched, train_dataset=Rows()).method_config.lr == 1e-6
