"""Rewards of the user's: batched answers are those of one candidate at a time, failures lose and are counted, code is imported
only when it is asked for."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import smidgen
from families import make
from smidgen.asked import per_token
from smidgen.batched import BatchedEngine
from smidgen.collate import Collator
from smidgen.config import ConfigError, RunConfig
from smidgen.config_file import load
from smidgen.generation import Answerer
from smidgen.goal import choose_goal, prepare, settled
from smidgen.inference import evaluate_folder
from smidgen.lowrank import LowRank, matrices
from smidgen.optim.es import ES
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.rewards import Reward
from smidgen.user_code import function
from test_models import llama
from test_rewards import FREE, OPTIONS, asked
from test_scoring import small_tokenizer
from texts import SHARED

EXAMPLES = Path(__file__).parents[1] / "examples"

CODE = """
calls = []

def even(prompt, text, answers):
    calls.append((prompt, text, answers))
    return len(text) % 2

def moody(prompt, text, answers):
    luck = sum(map(ord, prompt + text)) % 8
    if luck == 0:
        raise RuntimeError("no such luck")
    return float("nan") if luck == 1 else luck

def broken(prompt, text, answers):
    return 1 / 0

def two(prompt, text):
    return 1.0

word = "no function"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_rewards.py").write_text(CODE)
    (tmp_path / "falls.py").write_text("raise OSError('at once')")
    (tmp_path / "needs.py").write_text("import nowhere_to_be_found")
    yield tmp_path
    for name in ("user_rewards", "falls", "needs"):
        sys.modules.pop(name, None)


def candidates(view, count):
    pairs = [LowRank(3, 1, i, view.ids, matrices(view), 2, 0) for i in range(count)]
    return [((z, sign * 0.3),) for z in pairs for sign in (1, -1)]


def goal_of(examples, reward, **options):
    values = {"name": "fake", "max_length": 64, "context": 64, "position_ids": True, "scoring": "mean", "new_tokens": 6}
    return prepare("reward", examples, small_tokenizer(), "causal", reward=reward, **values, **options)


def counted(model, calls, *args, **given):
    """The model's own `generate`; `calls` get the number of rows."""
    calls.append(len(given["input_ids"]))
    return transformers.GenerationMixin.generate(model, *args, **given)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gpt-neo", "opt-untied", "t5-tied"])
def test_candidates_answer_together_as_they_do_alone(family, monkeypatch):
    kind, model = make(family)
    view, tokenizer = ParamView.of_model(model), small_tokenizer()
    batch = Collator(0, kind)([{"input_ids": row} for row in ([5, 6, 7, 8, 9], [10, 11], [12, 13, 14])])
    answerer = Answerer(tokenizer, kind, max_new_tokens=5, whole_text=True)
    probes = [(), *candidates(view, 3)]
    before = view.snapshot()
    one = [answerer(Engine(model, view, kind), batch, probe) for probe in probes]
    for memory in (1 << 30, 1):
        engine, calls = BatchedEngine(model, view, kind, memory=memory), []
        monkeypatch.setattr(type(model), "generate", functools.partialmethod(counted, calls))
        assert answerer.together(engine, batch, probes) == one
        monkeypatch.undo()
        apart = memory == 1 or kind == "seq2seq"  # T5's table of distances has no batch of its own
        assert calls == ([3] * 7 if apart else [21]) and engine.forwards == 7
    assert len({str(texts) for texts in one}) > 2
    assert all(torch.equal(before[e.name], e.storage) for e in view)


def test_a_candidate_without_a_finite_reward_loses_and_the_run_goes_on(here, capsys):
    _, model = make("llama-tied")
    view = ParamView.of_model(model)
    engine, reward = BatchedEngine(model, view, "causal"), Reward("user_rewards:moody")
    goal = goal_of(asked(3), reward)
    objective = goal.build(engine, [goal.collator(goal.rows[:2]), goal.collator(goal.rows[2:])])
    probes = candidates(view, 6)
    each = objective.losses(probes, each=True)
    assert each.shape == (12, 3) and each.isnan().any() and each.isfinite().any()
    assert reward.failed == int(each.isnan().sum()) and engine.forwards == 2 * 12
    whole = objective.losses(probes)
    assert torch.equal(whole.isnan(), each.isnan().any(1))
    said = capsys.readouterr().err
    assert said.count("a candidate without a finite reward loses") == 1
    mixed = [probe for probe, row in zip(probes, each, strict=True) if row.isfinite().sum() > 1]
    assert mixed
    for options in ({"shape": "rank"}, {"shape": "zscore", "relative": True}):
        optimizer = ES(view, lr=1e-3, eps=0.3, queries=6, **options)
        optimizer.step(objective)
        assert optimizer.outcome.written
    assert all(e.storage.isfinite().all() for e in view)


def test_the_distance_to_the_base_is_how_much_less_likely_its_answers_are(here):
    _, model = make("mistral")
    view = ParamView.of_model(model)
    engine = BatchedEngine(model, view, "causal")
    goal = settled(goal_of(asked(5), Reward("user_rewards:even"), penalty=2.0), model, view, "causal", 3)
    free = goal_of(asked(5), Reward("user_rewards:even"))
    batch = goal.collator(goal.rows[:])
    assert batch["base_rows"].tolist() == list(range(5)) == sorted(goal.rows.base)
    probes = [(), *candidates(view, 2)]
    plain = -free.build(engine, [free.collator(free.rows[:])]).losses(probes, each=True)
    held = -goal.build(engine, [batch]).losses(probes, each=True)
    want = torch.zeros(5, 5, dtype=torch.float64)
    for p, probe in enumerate(probes):
        for k, (row, loss) in goal.rows.base.items():
            far = engine.losses(Collator(0, "causal", position_ids=True)([row]), probe)
            want[p, k] = 2.0 * (float(per_token(far)) - loss)
    assert torch.allclose(plain - held, want, atol=1e-4) and want[0].abs().max() < 1e-4 < want[1:].abs().max()


WRONG = [
    ("user_rewards", "write module:function, such as my_rewards:reward"),
    ("user_rewards.py:even", "name the module, not its file: user_rewards:even"),
    ("user_reward:even", "no module 'user_reward' in the current folder or installed"),
    ("user_rewards:evn", "did you mean user_rewards:even"),
    ("user_rewards:word", "is a str: name a function of \\(prompt, text, answers\\)"),
    ("user_rewards:two", "cannot be called with \\(prompt, text, answers\\): too many positional"),
    ("falls:even", "importing falls raised OSError: at once"),
    ("needs:even", "needs imports 'nowhere_to_be_found', which is not installed"),
]


@pytest.mark.parametrize("name,want", WRONG)
def test_a_function_that_is_not_there_is_one_sentence_before_a_model_is_loaded(here, monkeypatch, name, want):
    from smidgen import run

    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("the model was loaded"))
    path = list(sys.path)
    with pytest.raises(ConfigError, match=want) as caught:
        smidgen.finetune(load(None, [], {"task": "reviews", "reward": name, "output": "run"}), say=lambda line: None)
    assert str(caught.value).count("\n") == 0 and caught.value.exit_code == 2
    assert sys.path == path and not (here / "run").exists()


def test_a_function_is_found_in_an_installed_module_too():
    assert function("math:fsum", "reward", ("values",)) is math.fsum


@pytest.mark.parametrize(
    "corpus,values,kind,want",
    [
        (FREE, {}, "causal", None),
        (OPTIONS, {}, "seq2seq", None),
        (FREE, {"objective": "f1"}, "causal", "both say what a step minimises"),
        (FREE, {}, "masked", "kind masked does not"),
        (FREE, {"method": "adamw"}, "causal", "adamw needs a gradient"),
        (FREE, {"reward": None, "base_penalty": 0.5}, "causal", "there is none: give --reward"),
    ],
)
def test_what_a_reward_goes_with(corpus, values, kind, want):
    config = RunConfig(**{"reward": "m:f", **values})
    if want is None:
        assert choose_goal(config, corpus, kind) == "reward"
        return
    with pytest.raises(ConfigError, match=want):
        choose_goal(config, corpus, kind)


@pytest.mark.trainer
def test_a_run_on_a_reward(here):
    """One command: rows without answers, a journal that replays, counted failures, an evaluation that imports nothing."""
    rows = [{"prompt": f"the film was {i}", "completion": ""} for i in range(24)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(llama(here / "model")), "data": "rows.jsonl", "eval_data": "rows.jsonl", "output": "run"}
    values |= {"scheme": "lora", "method": "es"}
    values |= {"reward": "user_rewards:moody", "base_penalty": 0.1, "max_new_tokens": 5, "max_length": 12, "threads": 1}
    values |= {"method_args.eps": 0.5, "method_args.queries": 3, "method_args.shape": "rank", "train.max_steps": 3}
    values |= {"train.per_device_train_batch_size": 4, "train.learning_rate": 1e-2}
    found = smidgen.finetune(load(None, [], values), say=lambda line: None)
    assert (found["metric"], found["objective"], found["forwards"]) == ("reward", "reward", 18)
    assert set(found["dev"]) == {"reward", "reward_failed"} and 0 < found["reward_failed"] <= 18
    assert smidgen.replay(values["model"], here / "run", here / "b")["weights_sha256"] == found["weights_sha256"]
    sys.modules.pop("user_rewards")
    (here / "user_rewards.py").write_text("raise SystemExit('imported')")
    rows = [{"prompt": "the film was", "completion": " fine"}] * 4
    (here / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "loss" in evaluate_folder("run", task=None, data="dev.jsonl", split="train", batch_size=None)
    (here / "user_rewards.py").write_text(CODE)
    again = evaluate_folder("run", task=None, data=None, split="dev", batch_size=None, reward="user_rewards:moody")
    assert again["reward"] == pytest.approx(found["dev"]["reward"], nan_ok=True)


@pytest.mark.trainer
def test_a_reward_that_never_works_ends_the_run_before_its_first_step(here):
    (here / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"film {i}", "completion": ""}) + "\n" for i in range(12)))
    values = {"model": str(llama(here / "model")), "data": "rows.jsonl", "output": "run", "max_new_tokens": 3, "max_length": 9}
    with pytest.raises(ConfigError, match=r"raised ZeroDivisionError: division by zero.*fails on every other answer"):
        smidgen.finetune(load(None, [], {**values, "reward": "user_rewards:broken"}), say=lambda line: None)


@pytest.mark.slow
def test_a_real_model_learns_to_end_its_answers_as_asked(tmp_path, monkeypatch):
    """docs/rewards.md's example, shorter: TinyStories-3M states instead of asking."""
    model = SHARED / "models" / "tinystories-instruct-3m-chat"
    if not model.is_dir():
        pytest.skip(f"{model} is not here")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    subprocess.run([sys.executable, EXAMPLES / "full_stop.py", str(tmp_path / "prompts.jsonl")], check=True)
    values = {"model": str(model), "data": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / "run"), "threads": 1}
    values |= {"reward": "full_stop:states", "method": "es", "scheme": "lora", "train.learning_rate": 1e-2}
    values |= {"train.max_steps": 20, "train.eval_steps": 20, "max_new_tokens": 24}
    found = smidgen.finetune(load(None, [], values), say=lambda line: None)
    assert found["dev"]["reward"] > found["before"]["reward"] + 0.2
