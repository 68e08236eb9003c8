"""Preference pairs: rows, the loss of direct preference optimisation, its reference, trl's trainer, whole runs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import smidgen
from families import batch, make
from smidgen import journal, tasks
from smidgen.batched import BatchedEngine
from smidgen.collate import Collator
from smidgen.config import ConfigError, DataError
from smidgen.config_file import load
from smidgen.directions import Dense
from smidgen.inference import evaluate_folder
from smidgen.objective import ModelObjective
from smidgen.pairs import Pairs, refer
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.tasks import Row
from test_models import bert_masked, gpt2, llama
from texts import byte_tokenizer

ASKED = {"role": "user", "content": "What is it?"}
GOOD, BAD = {"role": "assistant", "content": "a fine film"}, {"role": "assistant", "content": "bad"}


def pairs_of(*records: dict[str, Any], **options: Any) -> list[Any]:
    task = tasks.get("preference").build(tasks.get("preference").Config(**options))
    task.read = lambda source, split: [Row(record, f"a.jsonl:{k}") for k, record in enumerate(records, 1)]
    return task.examples("train")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "What is it?", "chosen": "a fine film", "rejected": "bad"},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
)
def test_every_form_becomes_the_same_pair(record):
    (pair,) = pairs_of(record)
    assert pair.chosen.messages == (ASKED, GOOD) and pair.rejected.messages == (ASKED, BAD) and pair.chosen.turns == "last"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "no 'rejected' (found: prompt, chosen): a pair needs prompt, chosen and rejected"),
        ({"chosen": "a", "rejected": "b"}, "'chosen' is text and there is no 'prompt'"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "an answer is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same answer"),
        ({"chosen": [ASKED, GOOD], "rejected": [{"role": "user", "content": "x"}, BAD]}, "answer different prompts"),
        ({"prompt": "p", "chosen": {"a": 1}, "rejected": "a"}, "text is needed"),
    ],
)
def test_bad_rows(record, message):
    with pytest.raises(DataError) as caught:
        pairs_of(record)
    assert str(caught.value).startswith("a.jsonl:1: ") and message in str(caught.value)


# -- the loss

BETA = 0.3


def stacked(kind: str = "causal") -> dict[str, Any]:
    """Two pairs as a batch, with references."""
    found = batch(kind, rows=4, labels="all")
    found["labels"][1, :5] = found["labels"][2, :3] = -100
    return {
        **found,
        "groups": torch.tensor([0, 0, 1, 1]),
        "golds": torch.tensor([0, 2]),
        "divisors": torch.full((4,), 1 / BETA),
        "references": torch.tensor([-30.0, -17.0, -24.0, -33.0], dtype=torch.float64),
    }


def by_hand(model: torch.nn.Module, data: dict[str, Any]) -> torch.Tensor:
    """Equation 7 of the paper, from the model's own logits."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1].double()
    labels = data["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    ratios = (each * (labels != -100)).sum(1) - data["references"]
    return -torch.nn.functional.logsigmoid(BETA * (ratios[0::2] - ratios[1::2]))


@pytest.mark.parametrize("family", ["llama-tied", "opt-untied"])
def test_the_loss_its_gradient_and_its_slope_are_the_papers(family):
    _, model = make(family)
    view, data = ParamView.of_model(model), stacked()
    objective = ModelObjective(BatchedEngine(model, view, "causal"), [data])
    expected = by_hand(model, data)
    assert torch.allclose(objective.losses([()], each=True)[0], expected.detach(), atol=1e-6)  # float32 sums of 8 labels
    expected.mean().backward()
    grads = {e.name: e.tensor.grad.clone() for e in view}
    model.zero_grad()
    assert abs(objective.backward(dropout=False) - float(expected.mean())) < 1e-6
    assert all(torch.allclose(e.tensor.grad, grads[e.name], atol=1e-6) for e in view)
    z = Dense(0, 0, 0, view.ids)
    slope = objective.slope(z)[1]
    along = 0.0
    for name, grad in grads.items():
        z.displaced(name, torch.zeros_like(grad), 1.0, displaced := torch.empty_like(grad))
        along += float((grad * displaced).sum())
    assert abs(slope - along) < 1e-4 * max(1.0, abs(along))


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECORDS = [
    {
        "prompt": [{"role": "user", "content": f"What is {k}?"}],
        "chosen": [{"role": "assistant", "content": f"a fine film {'great ' * (k % 3)}"}],
        "rejected": [{"role": "assistant", "content": f"bad {k % 4}"}],
    }
    for k in range(12)
]


@pytest.mark.trainer
def test_trls_trainer_runs_forward_only_and_its_loss_is_ours(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = byte_tokenizer(chat=TURNS)
    model = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "model"), dtype=torch.float32)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, precompute_ref_log_probs=True, beta=BETA,
    )  # fmt: skip
    cls = smidgen.forward_only(trl.DPOTrainer, method="zo_sgd", lr=1e-3)
    trainer = cls(model=model, args=config, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer)
    pairs = Pairs(pairs_of(*RECORDS), tokenizer, "causal", 64, beta=BETA, context=64)
    view, collator = ParamView.of_model(model), Collator(tokenizer.pad_token_id, "causal")
    refer(pairs, model, view, "causal", collator, 4)
    trainer.train()
    assert all(math.isfinite(value) for step in journal.read(tmp_path / "run" / "journal.bin").steps() for value in step.values)
    rows = trainer.train_dataset
    theirs = float(trainer.compute_loss(model.eval(), trainer.data_collator([rows[i] for i in range(12)])))
    engine = Engine(model, view, "causal")
    ours = float(engine.losses(collator(pairs[:])).nll.mean())
    assert theirs != pytest.approx(math.log(2), abs=1e-5) and ours == pytest.approx(theirs, abs=2e-5)  # float32 sums in trl


# -- whole runs


def tune(folder: Any, **options: Any) -> dict[str, Any]:
    values = {"task": "preference", "chat": "tulu", "train.max_steps": 6, "max_length": 56, "output": str(folder)}
    return smidgen.finetune(load(None, [], {**values, **options}), say=lambda line: None)


def write(path: Any, records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.trainer
@pytest.mark.parametrize(
    ("build", "method", "scheme", "lr"),
    [
        (llama, "adamw", "full", 1e-2),
        (gpt2, "adamw", "lora", 1e-1),
        (llama, "zo_sgd", "full", 1e-2),
        (gpt2, "lozo", "prefix", 1e-3),
    ],
)
def test_runs_of_pairs(tmp_path, build, method, scheme, lr):
    data = write(tmp_path / "a.jsonl", RECORDS)
    options = {"method": method, "scheme": scheme, "train.learning_rate": lr, "data": data, "eval_data": data}
    found = tune(tmp_path / "run", model=str(build(tmp_path / "model")), **options)
    before, after = found["before"], found["dev"]
    assert found["metric"] == "accuracy" and found["objective"] == "preference"
    if scheme != "prefix":  # a prefix is drawn at the start: the reference is the model without it
        assert before["accuracy"] == 0.5 and before["margin"] == 0.0 and before["loss"] == pytest.approx(math.log(2))
    if method == "adamw":
        assert after["accuracy"] == 1.0 and after["loss"] < 0.68 and after["margin"] > 0.02
    again = evaluate_folder(str(tmp_path / "run"), task=None, data=None, split="dev", batch_size=None)
    assert again["loss"] == pytest.approx(after["loss"], abs=1e-5) and again["accuracy"] == after["accuracy"]
    if method == "zo_sgd":
        rebuilt = smidgen.replay(str(tmp_path / "model"), tmp_path / "run", tmp_path / "rebuilt")
        assert rebuilt["weights_sha256"] == found["weights_sha256"]


@pytest.mark.trainer
def test_runs_that_are_refused(tmp_path):
    data, model = write(tmp_path / "a.jsonl", RECORDS), str(llama(tmp_path / "model"))

    def refused(**options: Any) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            tune(tmp_path / "run", **{"model": model, "data": data, **options})
        return str(caught.value)

    assert "a model of kind masked (an encoder) does not write" in refused(model=str(bert_masked(tmp_path / "encoder")))
    assert "no chat template" in refused(chat="none")
    assert "packing: the two answers of a pair are compared" in refused(packing=True)
    assert "objective f1: the rows are preference pairs" in refused(objective="f1")
    assert "without room for an answer, left out" in refused(max_length=4)
    assert not (tmp_path / "run").exists()


def test_pairs_without_room_are_left_out_together():
    tokenizer = byte_tokenizer(chat=TURNS)
    long = {**RECORDS[0], "prompt": "x" * 40, "chosen": "a", "rejected": "b"}
    found = Pairs(pairs_of(RECORDS[1], long), tokenizer, "causal", 40, beta=BETA, context=64)
    assert len(found) == 1 and "1 of 2 pairs without room for both answers are left out" in found.notices[-1]
