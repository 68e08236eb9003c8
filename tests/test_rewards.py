"""Objectives without a gradient: minus what the evaluation measures, ties that change nothing, methods that are refused."""

from __future__ import annotations

import json

import pytest
import torch

import families
import smidgen
import texts
from smidgen.collate import Collator
from smidgen.config import ConfigError, RunConfig
from smidgen.config_file import load
from smidgen.data import Corpus
from smidgen.directions import Dense
from smidgen.evaluate import evaluation
from smidgen.goal import choose_goal, prepare
from smidgen.objective import Recorded, Replayed
from smidgen.optim.zo_sgd import ZOSGD
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.ranks import Reduced
from smidgen.rewards import RewardObjective
from smidgen.tasks import Example
from smidgen.tasks._labelled import accuracy as share
from test_models import bert_masked, llama, roberta, t5
from test_scoring import EXAMPLES, small_tokenizer, story


class Fake:
    """A task of given examples."""

    name, source, words, judged = "fake", "", None, True

    def __init__(self, examples, choice=True, free=False):
        self.given, self.choice, self.free = examples, choice, free

    def examples(self, split, kind="causal"):
        return list(self.given)

    def metric(self, predictions, golds):
        if self.free:
            return {"f1": sum(p in g for p, g in zip(predictions, golds, strict=True)) / len(golds)}
        return {"accuracy": share(predictions, golds)}


def corpus_of(examples, **options):
    return Corpus("fake", Fake(examples, **options), lambda split: [], lambda split: True)


def goal_of(goal, examples, tokenizer, kind, **options):
    values = {"name": "fake", "max_length": 64, "context": 64, "position_ids": True, "scoring": "mean", **options}
    return prepare(goal, examples, tokenizer, kind, **values)


def engine_of(family):
    kind, model = families.make(family)
    return Engine(model, ParamView.of_model(model), kind)


def in_batches(prepared, engine, size=3):
    """The objective of all rows, in micro-batches."""
    rows = prepared.rows
    batches = [prepared.collator(rows[first : first + size]) for first in range(0, len(rows), size)]
    return prepared.build(engine, batches)


ONE_TOKEN = [story(n, (" terrible", " great", " fine"), n % 3) for n in range(3, 14)]


@pytest.mark.parametrize(
    "family,examples",
    [
        ("llama-tied", ONE_TOKEN),
        ("gpt2", EXAMPLES * 3),
        ("opt-tied", EXAMPLES),
        ("t5-tied", EXAMPLES),
        ("bert-classification", ONE_TOKEN),
    ],
)
def test_accuracy_is_what_the_evaluation_finds_on_the_same_rows(family, examples):
    engine, tokenizer = engine_of(family), small_tokenizer()
    positions = engine.kind == "causal"
    objective = in_batches(goal_of("accuracy", examples, tokenizer, engine.kind, position_ids=positions), engine)
    measured = evaluation(
        corpus_of(examples), "train", tokenizer, engine.kind, max_length=64, context=64, batch_size=4, position_ids=positions
    )
    probes = [(), *(((Dense(1, 0, i, engine.view.ids, "gaussian"), 0.1),) for i in range(3))]
    found = objective.losses(probes)
    want = [measured(engine, probe)["accuracy"] for probe in probes]
    assert found.tolist() == pytest.approx([-value for value in want], abs=1e-12)
    assert len(set(want)) > 1 or engine.kind == "seq2seq"
    each = objective.losses(probes, each=True)
    assert each.shape == (4, len(examples)) and set(each.flatten().tolist()) <= {0.0, -1.0}
    assert torch.allclose(each.mean(1), found)


def test_an_option_that_counts_as_right_is_right():
    """A ReCoRD query accepts several entities: the best option, made one of them, is right wherever gold is."""
    engine, tokenizer = engine_of("llama-tied"), small_tokenizer()
    plain = evaluation(corpus_of(EXAMPLES), "train", tokenizer, "causal", max_length=64, context=64, batch_size=4)
    best = plain.predictions(engine)
    other = [(b + 1) % len(e.options) for b, e in zip(best, EXAMPLES, strict=True)]
    for right, want in ((lambda b, o: (o,), 0.0), (lambda b, o: (o, b), 1.0)):
        examples = [
            Example(e.prompt, e.options[o], "", e.options, o, e.text, right=right(b, o))
            for e, b, o in zip(EXAMPLES, best, other, strict=True)
        ]
        measured = evaluation(corpus_of(examples), "train", tokenizer, "causal", max_length=64, context=64, batch_size=4)
        assert measured(engine)["accuracy"] == want
        objective = in_batches(goal_of("accuracy", examples, tokenizer, "causal", position_ids=False), engine)
        assert float(objective.losses([()])) == -want


@pytest.mark.parametrize("family,examples", [("llama-tied", ONE_TOKEN), ("gpt2", EXAMPLES), ("bert-classification", ONE_TOKEN)])
def test_a_model_whose_scores_are_not_numbers_has_no_accuracy(family, examples):
    """The best of equal NaNs would be the first option: a model that diverged would look right now and then."""
    engine, tokenizer = engine_of(family), small_tokenizer()
    objective = in_batches(goal_of("accuracy", examples, tokenizer, engine.kind), engine)
    assert objective.losses([()]).isfinite()
    for entry in engine.view:
        entry.storage.fill_(torch.nan)
    assert objective.losses([()]).isnan()
    opt = ZOSGD(engine.view)
    opt.step(objective)
    assert not opt.outcome.written


def asked(count):
    words = texts.WORDS.replace(":", "").split()
    return [Example(" ".join(words[i : i + 4 + i % 5]), " " + words[i], golds=(words[i], words[i + 3])) for i in range(count)]


def test_f1_and_exact_match_are_what_the_evaluation_finds_on_the_same_rows():
    engine, tokenizer = engine_of("llama-tied"), small_tokenizer()
    examples = asked(8)
    probe = ((Dense(0, 0, 0, engine.view.ids, "rademacher"), 0.2),)
    none = Corpus("mine", None, lambda split: [], lambda split: True)
    none.examples = lambda *_: examples  # type: ignore[method-assign]
    measured = evaluation(none, "train", tokenizer, "causal", max_length=64, context=64, batch_size=3, generated=True)
    engine.prepare(Collator(0, "causal")(measured.rows[:]))
    measured.answers.answerer.max_new_tokens = 6
    texts_found = measured.answers.texts(engine, 3, probe)
    assert texts_found != measured.answers.texts(engine, 3) and any(texts_found)
    said = [Example(e.prompt, e.answer, golds=(f"{text} one",)) for e, text in zip(examples[:5], texts_found, strict=False)]
    said += [
        Example(e.prompt, e.answer, golds=("nothing", text)) for e, text in zip(examples[5:], texts_found[5:], strict=True)
    ]
    measured.answers.prompts.answers = [e.golds for e in said]
    want = measured(engine, probe)
    assert want["exact_match"] == 3 / 8 < want["f1"] < 1.0 and want["loss"] > 0
    for goal in ("f1", "exact_match"):
        objective = in_batches(goal_of(goal, said, tokenizer, "causal"), engine)
        objective.measure.answerer.max_new_tokens = 6
        before = engine.forwards
        assert float(objective.losses([probe])) == pytest.approx(-want[goal], abs=1e-12)
        assert engine.forwards == before + 3  # one a micro-batch
        assert objective.losses([probe, ()], each=True).shape == (2, 8)


def test_the_answers_of_a_free_task_are_measured_by_the_task():
    engine, tokenizer = engine_of("llama-tied"), small_tokenizer()
    measured = evaluation(
        corpus_of(asked(4), choice=False, free=True), "train", tokenizer, "causal", max_length=64, context=64, batch_size=3
    )
    assert measured(engine).keys() == {"loss", "f1"}


def test_a_tie_changes_nothing_and_replays():
    """c = 0: no weight moves by a bit, raw or divided by a running RMS."""
    engine, tokenizer = engine_of("llama-tied"), small_tokenizer()
    objective = in_batches(goal_of("accuracy", ONE_TOKEN, tokenizer, "causal"), engine)
    before = engine.view.snapshot()
    for normalise in ("none", "rms"):
        optimizer = ZOSGD(engine.view, lr=0.1, eps=1e-9, normalise=normalise)
        for _ in range(3):
            recorded = Recorded(objective)
            loss = optimizer.step(recorded)
            assert optimizer.outcome.written and -1.0 <= loss <= 0.0
            assert optimizer.outcome.measures["zo/projected_grad"] == 0.0
        assert ZOSGD(engine.view, lr=0.1, eps=1e-9).step(Replayed(recorded.values)) == loss
    for e in engine.view:
        assert torch.equal(e.storage, before[e.name])


def test_it_has_no_gradient_and_says_so():
    objective = RewardObjective(engine_of("llama-tied"), [], lambda engine, batch, probe: torch.ones(1))
    z = Dense(1, 0, 0, objective.engine.view.ids, "gaussian")
    for call in (objective.backward, lambda: objective.slope(z), lambda: Reduced(objective).backward()):
        with pytest.raises((ConfigError, ValueError), match=r"no gradient|back-propagation"):
            call()


def test_the_inputs_of_layers_are_counted_whatever_the_measure():
    engine, tokenizer = engine_of("llama-tied"), small_tokenizer()
    name = next(e.name for e in engine.view if e.name.endswith("q_proj.weight"))
    taken = []
    for goal, examples in (("f1", asked(3)), ("accuracy", EXAMPLES)):
        prepared = goal_of(goal, examples, tokenizer, "causal", position_ids=False)
        found = in_batches(prepared, engine).input_squares([name])[name]
        rows = prepared.rows.prompts.encoded if goal == "f1" else prepared.rows.options
        tokens = [torch.tensor([row["input_ids"]]) for row in rows]
        taken.clear()
        hook = engine.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, x: taken.append(x[0])
        )
        with torch.no_grad():
            for ids in tokens:
                engine.model(ids)
        hook.remove()
        want = sum(x.double().square().sum((0, 1)) for x in taken)
        assert (found.flatten() / want - 1).abs().max() < 1e-5


OPTIONS, FREE = corpus_of(EXAMPLES), corpus_of(asked(3), choice=False, free=True)


@pytest.mark.parametrize(
    "corpus,values,kind,want",
    [
        (OPTIONS, {}, "causal", "choice"),
        (corpus_of(EXAMPLES, choice=False), {}, "causal", "answer"),
        (corpus_of(EXAMPLES, choice=False), {"objective": "choice"}, "seq2seq", "choice"),
        (FREE, {}, "causal", "answer"),
        (FREE, {"objective": "f1"}, "causal", "f1"),
        (OPTIONS, {"objective": "answer"}, "masked", "answer"),
        (OPTIONS, {"objective": "accuracy"}, "classification", "accuracy"),
        (OPTIONS, {"objective": "accuracy", "method": "adamw"}, "causal", "adamw needs a gradient"),
        (OPTIONS, {"objective": "f1"}, "causal", "have options: accuracy"),
        (OPTIONS, {"objective": "answer"}, "classification", "has none: choice"),
        (FREE, {"objective": "accuracy"}, "causal", "free text"),
        (FREE, {"objective": "exact_match"}, "masked", "kind masked does not"),
    ],
)
def test_what_a_step_minimises(corpus, values, kind, want):
    config = RunConfig(**values)
    if " " not in want:
        assert choose_goal(config, corpus, kind) == want
        return
    with pytest.raises(ConfigError, match=want) as caught:
        choose_goal(config, corpus, kind)
    assert caught.value.exit_code == 2 and str(caught.value).count("\n") == 0


# -- whole runs


def rows_in(folder, *records):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tune(model, folder, data, **options):
    values = {"model": str(model), "data": str(data), "output": str(folder), "train.max_steps": 4, "train.learning_rate": 1e-2}
    return smidgen.finetune(load(None, [], {**values, **options}), say=lambda line: None)


LABELLED = [{"text": f"row {i} is {'fine' if i % 2 else 'poor'}", "label": "great" if i % 2 else "terrible"} for i in range(40)]
LONG = [{**row, "label": f"the {row['label']} one of them"} for row in LABELLED]


@pytest.mark.trainer
@pytest.mark.parametrize(
    "make,rows,kind",
    [
        (llama, LABELLED, "causal"),
        (llama, LONG, "causal"),
        (bert_masked, LABELLED, "masked"),
        (roberta, LABELLED, "classification"),
        (t5, LABELLED, "seq2seq"),
    ],
)
def test_a_run_on_accuracy_trains_and_replays(tmp_path, make, rows, kind):
    model, data = make(tmp_path / "model"), rows_in(tmp_path, *rows)
    options = {"template": "{text} It was {answer}."} if kind == "masked" else {}
    eps = {"method_args.eps": 0.3}
    found = tune(model, tmp_path / "run", data, kind=kind, objective="accuracy", **options, **eps)
    assert found["objective"] == "accuracy" and found["metric"] == "accuracy" and found["forwards"] == 8
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(-1.0 <= loss <= 0.0 for loss in losses if loss is not None)
    again = smidgen.replay(str(model), tmp_path / "run", tmp_path / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"]


@pytest.mark.trainer
def test_a_run_on_the_f1_of_generated_answers(tmp_path):
    rows = [{"prompt": f"the film was {i}", "completion": " fine great"} for i in range(24)]
    model, data = llama(tmp_path / "model"), rows_in(tmp_path, *rows)
    options = {"objective": "f1", "train.max_steps": 2, "method_args.eps": 0.3, "max_length": 12, "scheme": "lora"}
    options["train.per_device_train_batch_size"] = 4
    found = tune(model, tmp_path / "run", data, **options)
    assert found["metric"] == "f1" and found["forwards"] == 4 and {"loss", "f1", "exact_match"} <= found["dev"].keys()
    assert smidgen.replay(str(model), tmp_path / "run", tmp_path / "b")["weights_sha256"] == found["weights_sha256"]


@pytest.mark.trainer
@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_options_of_several_tokens_train_by_choice_or_by_answer(tmp_path, scheme):
    model, data = llama(tmp_path / "model"), rows_in(tmp_path, *LONG)
    choice = tune(model, tmp_path / "choice", data, scheme=scheme)
    answer = tune(model, tmp_path / "answer", data, scheme=scheme, objective="answer")
    assert (choice["objective"], answer["objective"]) == ("choice", "answer")
    assert choice["before"]["accuracy"] == answer["before"]["accuracy"]
    assert choice["before"]["loss"] < 2 < answer["before"]["loss"]  # of two options, and of tokens out of 400
    assert choice["tokens"] == pytest.approx(2 * answer["tokens"], rel=0.2)


@pytest.mark.trainer
def test_methods_with_gradients_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    from smidgen import run

    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("the model was loaded"))
    for method in ("adamw", "sgd"):
        with pytest.raises(ConfigError, match="needs a gradient") as caught:
            tune(llama(tmp_path / method), tmp_path / "run", rows_in(tmp_path, *LABELLED), objective="accuracy", method=method)
        assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_the_flag_of_the_command(tmp_path, monkeypatch):
    """`smidgen train --objective`: what cannot be had ends with one sentence and exit code 2 before a model is read."""
    from typer.testing import CliRunner

    from smidgen import run
    from smidgen.cli import app

    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("the model was loaded"))
    for values, reason in ((["f1"], "have options: accuracy"), (["accuracy", "--method", "adamw"], "needs a gradient")):
        done = CliRunner().invoke(app, ["train", "-t", "reviews", "-o", str(tmp_path / "run"), "--objective", *values])
        assert isinstance(done.exception, ConfigError) and reason in str(done.exception) and done.exception.exit_code == 2
    done = CliRunner().invoke(
        app, ["train", "-t", "reviews", "-o", str(tmp_path / "run"), "--objective", "accuracy", "--dry-run"]
    )
    assert done.exit_code == 0 and "objective: accuracy" in done.output
