"""Text streams and runs from random weights: rows are the text, read whole or while the run goes; a run is its seed's."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import transformers as tf

import smidgen
from smidgen import blank, models
from smidgen.config import ConfigError, DataError, Interrupted
from smidgen.config_file import load
from smidgen.export import export
from smidgen.inference import evaluate_folder
from smidgen.stream import TextRows, TextStream
from texts import byte_tokenizer, shared, write

TEXTS = [f"document {i} tells of {'ships' if i % 3 else 'stones'} and of nothing else." for i in range(60)]


@pytest.fixture
def place(tmp_path):
    """A folder of text with splits, a tokenizer, and a small configuration."""
    (tmp_path / "text").mkdir()
    write(tmp_path / "text" / "train.jsonl", *({"text": t} for t in TEXTS))
    write(tmp_path / "text" / "validation.jsonl", *({"text": t} for t in TEXTS[:9]))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tf.LlamaConfig(**sizes, max_position_embeddings=64).save_pretrained(tmp_path / "tiny")
    return tmp_path


def tune(place, name="run", said=None, **options):
    values = {"model": f"config:{place / 'tiny'}", "tokenizer": str(place / "tokenizer"), "data": str(place / "text")}
    values |= {"output": str(place / name), "max_length": 32, "train.max_steps": 4, "train.per_device_train_batch_size": 4}
    values |= {"threads": 1, "method": "adamw", "train.learning_rate": 1e-2}
    return smidgen.finetune(load(None, [], {**values, **options}), say=(lambda line: None) if said is None else said.append)


# ------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_the_documents_one_after_another():
    tokenizer = byte_tokenizer()
    rows = TextRows(TEXTS, tokenizer, 16)
    whole = [
        token for text in TEXTS for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert [token for row in rows for token in row["input_ids"]] == whole[: len(whole) // 16 * 16]
    assert all(row["labels"] == row["input_ids"] for row in rows) and len(rows) == len(whole) // 16
    assert rows.notices == [f"60 documents in {len(rows)} rows of 16 tokens"]
    with pytest.raises(DataError, match="fills no row of 100000 tokens"):
        TextRows(TEXTS, tokenizer, 100_000)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has none: set eos_token"):
        TextRows(TEXTS, tokenizer, 16)


def test_a_stream_gives_the_same_rows_and_never_ends():
    tokenizer, passes = byte_tokenizer(), []

    def texts(epoch):
        passes.append(epoch)
        return iter(TEXTS[epoch:])

    first, second = (TextRows(TEXTS[epoch:], tokenizer, 16) for epoch in (0, 1))
    found = list(itertools.islice(TextStream(texts, tokenizer, 16), len(first) + 3))
    assert found == [*first[:], *second[:3]] and passes == [0, 1]
    with pytest.raises(DataError, match="fills no row"):
        next(iter(TextStream(lambda epoch: iter(()), tokenizer, 16)))


# ------------------------------------------------------------------------------------------------------------- models


def test_blank_models_are_drawn_from_the_seed_for_the_tokenizer(place):
    name, own = f"config:{place / 'tiny'}", str(place / "tokenizer")
    state = torch.random.get_rng_state()
    first, second, other = (
        models.load_model(name, seed=s, own_tokenizer=own, notify=lambda line: None)[0].state_dict() for s in (3, 3, 4)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].shape[0] == len(byte_tokenizer())
    assert models.weights_bytes(name, own_tokenizer=own) == 4 * sum(
        t.numel() for k, t in first.items() if k != "lm_head.weight"
    )


@pytest.mark.parametrize(("size", "millions"), [("9m", 9.0), ("60m", 58.1), ("130m", 134.1)])
def test_the_configurations_that_ship_have_their_published_sizes(size, millions):
    config = tf.AutoConfig.from_pretrained(models.resolve(f"config:llama-{size}"))
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert blank.shipped() == ["llama-9m", "llama-60m", "llama-130m"]


def test_names_that_stand_for_nothing_are_refused(place):
    cases = {"llama-9": "did you mean 'llama-9m'", "./x": "that ship: llama-9m", str(place / "text"): "no config.json"}
    for name, told in {**cases, "llama-9m": "no tokenizer of its own: .* --tokenizer"}.items():
        with pytest.raises(ConfigError, match=told):
            models.load_model(f"config:{name}")
    with pytest.raises(ConfigError, match=r"there is no tokenizer './x': give a folder"):
        models.load_model("config:llama-9m", own_tokenizer="./x")


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.trainer
def test_a_run_from_random_weights_learns_the_text_and_says_what_it_chose(place):
    said: list[str] = []
    found = tune(place, said=said, **{"train.max_steps": 30})
    assert any(line.startswith("packing = stream") for line in said) and any("cosine_with_min_lr" in line for line in said)
    assert found["metric"] == "perplexity" and found["dev"]["perplexity"] == pytest.approx(math.exp(found["dev"]["loss"]))
    assert found["before"]["loss"] > math.log(200) and found["dev"]["perplexity"] < 0.5 * found["before"]["perplexity"]
    tf.AutoModelForCausalLM.from_pretrained(place / "run")
    measured = evaluate_folder(str(place / "run"), task=None, data=None, split="dev", batch_size=None)
    assert measured["perplexity"] == pytest.approx(found["dev"]["perplexity"], rel=1e-5)


@pytest.mark.trainer
def test_forward_only_methods_replay_on_the_configuration(place):
    found = tune(place, method="zo_sgd")
    again = smidgen.replay(f"config:{place / 'tiny'}", place / "run", place / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"]


@pytest.mark.trainer
def test_adapters_of_random_weights_tune_the_embeddings_whole(place):
    found = tune(place, scheme="lora", **{"scheme_args.target_modules": ["q_proj", "down_proj"], "scheme_args.rank": 2})
    ends = 2 * len(byte_tokenizer()) * 16
    assert found["tuned_weights"] == ends + 2 * 2 * (16 + 16 + 32 + 16)
    assert export(place / "run", place / "plain", "merged")["max_difference"] < 1e-4


@pytest.mark.trainer
@pytest.mark.parametrize(
    "options",
    [
        {"method": "galore", "method_args.rank": 4},
        {"method": "velora_adamw", "activations": "velora", "activations_args.size": 4},
    ],
)
def test_methods_of_the_study_take_the_whole_way(place, options):
    found = tune(place, **options, **{"train.max_steps": 20})
    assert found["dev"]["loss"] < found["before"]["loss"]


@pytest.mark.trainer
def test_text_is_streamed_through_datasets_and_a_run_goes_on_where_it_was(place, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    keys = {"streaming": True, "packing": "stream", "train.save_steps": 2, "train.max_steps": 6}
    whole = tune(place, "whole", **keys)
    assert whole["dev"]["loss"] < whole["before"]["loss"]
    from smidgen.trainer import Trainer

    step, made = Trainer.training_step, []

    def stopping(self, *args, **kwargs):
        made.append(1)
        if len(made) == 4:
            raise Interrupted("stopped by the test")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stopping)
    with pytest.raises(Interrupted):
        tune(place, "half", **keys)
    monkeypatch.undo()
    done = smidgen.finetune(load(None, [], {"output": str(place / "half"), "resume": True}), say=lambda line: None)
    assert done["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.trainer
def test_what_cannot_be_streamed_is_refused(place):
    keys = {"streaming": True, "packing": "stream"}
    with pytest.raises(ConfigError, match="does not know how many there are: give --steps"):
        tune(place, **keys, **{"train.max_steps": None})
    with pytest.raises(ConfigError, match="set packing=stream"):
        tune(place, streaming=True, packing=False)
    with pytest.raises(ConfigError, match="has no validation split"):
        tune(place, **keys, data=str(place / "text" / "train.jsonl"))
    write(place / "chat.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"chat\.jsonl:1: no column 'text'"):
        tune(place, data=str(place / "chat.jsonl"))
    with pytest.raises(ConfigError, match="packing is for answers of causal models"):
        tune(place, packing="stream", task="reviews", data=None)
    with pytest.raises(ConfigError, match="quantise = nf4: random weights"):
        tune(place, quantise="nf4", scheme="lora")


@pytest.mark.slow
@pytest.mark.trainer
def test_the_preset_of_c4_runs_on_its_sample(tmp_path):
    """The preset with other text and tokenizer, a short row and two steps: the code that streams the hub's C4."""
    options = {"preset": "c4-60m", "data": str(shared("data", "c4_demo")), "streaming": True, "output": str(tmp_path / "run")}
    options |= {"tokenizer": str(shared("models", "gpt2-tokenizer")), "max_length": 16, "dev_rows": 2, "train.max_steps": 2}
    options |= {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 1}
    found = smidgen.finetune(load(None, [], options), say=lambda line: None)
    assert found["steps"] == 2 and found["weights"] > 70e6
    settings = (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert "velora_adamw" in settings and "value+down" in settings and "cosine_with_min_lr" in settings
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
