"""Models: names, kinds, loading through the Auto classes, sizes without loading, and the errors of bad folders."""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import texts
from smidgen import models
from smidgen.config import ConfigError

SHARED = Path(__file__).parents[2] / "shared"
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def quiet(line: str) -> None:
    del line


def make(folder: Path, model_class: Any, config: tf.PretrainedConfig, tokenizer: Any = None, seed: int = 0) -> Path:
    """A saved random model with its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def opt(folder: Path) -> Path:
    config = tf.OPTConfig(
        vocab_size=400, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return make(folder, tf.OPTForCausalLM, config, texts.byte_tokenizer(bos=True))


def gpt2(folder: Path) -> Path:
    config = tf.GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return make(folder, tf.GPT2LMHeadModel, config, texts.byte_tokenizer())


def llama(folder: Path) -> Path:
    config = tf.LlamaConfig(vocab_size=400, **WIDE, max_position_embeddings=64, dtype="bfloat16")
    return make(folder, tf.LlamaForCausalLM, config, texts.byte_tokenizer(bos=True))


def bert_config(**options: Any) -> tf.BertConfig:
    return tf.BertConfig(vocab_size=200, **WIDE, max_position_embeddings=64, **options)


def bert(folder: Path) -> Path:
    return make(folder, tf.BertModel, bert_config(), texts.word_tokenizer())


def bert_masked(folder: Path) -> Path:
    return make(folder, tf.BertForMaskedLM, bert_config(), texts.word_tokenizer())


def roberta(folder: Path) -> Path:
    config = tf.RobertaConfig(vocab_size=400, **WIDE, max_position_embeddings=66, pad_token_id=1)
    return make(folder, tf.RobertaForMaskedLM, config, texts.byte_tokenizer(framed=True))


def t5(folder: Path) -> Path:
    config = tf.T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return make(folder, tf.T5ForConditionalGeneration, config, texts.sentence_tokenizer())


CASES = {
    "opt": (opt, "causal", 64),
    "gpt2": (gpt2, "causal", 64),
    "llama": (llama, "causal", 64),
    "bert": (bert_masked, "masked", 64),
    "roberta": (roberta, "masked", 64),
    "t5": (t5, "seq2seq", None),
}


def refuse(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == 2 and len(message) < 700 and "Traceback" not in message
    return message


# -- loading


@pytest.mark.parametrize("name", CASES)
def test_families_load_as_they_were_saved(name, tmp_path):
    build, kind, context = CASES[name]
    folder = build(tmp_path)
    model, tokenizer, found = models.load_model(str(folder), notify=quiet)
    assert found == kind and not model.training and models.fresh_parameters(model) == ()
    assert models.context_length(model.config) == context
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    saved = {}
    for file in folder.glob("*.safetensors"):
        from safetensors.torch import load_file

        saved |= load_file(file)
    state = model.state_dict()
    assert saved and all(torch.equal(state[key], value.float()) for key, value in saved.items())
    resident = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert models.weights_bytes(str(folder)) == resident
    assert models.weights_bytes(str(folder), "bfloat16") == resident // 2
    assert tokenizer.pad_token_id is not None


def test_dtypes(tmp_path):
    folder = str(llama(tmp_path))
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model, *_ = models.load_model(folder, dtype=dtype, notify=quiet)
        assert next(model.parameters()).dtype == expected
    assert models._dtype("auto", "cuda") == "auto"  # the checkpoint's
    assert "unknown dtype 'fp8'" in refuse(lambda: models.load_model(folder, dtype="fp8"))


def test_every_family_runs_on_encoded_rows(tmp_path):
    from smidgen.collate import Collator
    from smidgen.encode import encode

    for name, (build, kind, _) in CASES.items():
        model, tokenizer, _ = models.load_model(str(build(tmp_path / name)), notify=quiet)
        rows = encode([texts.labelled("the film was", 1), texts.labelled("It", 0)], tokenizer, kind, 32)
        collate = Collator(tokenizer.pad_token_id, kind, position_ids=models.wants_position_ids(model))
        with torch.no_grad():
            assert torch.isfinite(model(**collate(rows[:])).loss)


# -- heads


def test_an_encoder_becomes_a_classifier_with_a_head_from_the_seed(tmp_path):
    folder = str(bert(tmp_path))
    lines: list[str] = []
    states = random.getstate(), np.random.get_state()[1].copy()
    first, _, kind = models.load_model(folder, num_labels=3, seed=1, notify=lines.append)
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert kind == "classification" and models.fresh_parameters(first) == ("classifier.bias", "classifier.weight")
    assert lines == [f"classifier.bias, classifier.weight: not in the checkpoint of '{folder}', drawn from the seed"]
    again, other = (models.load_model(folder, num_labels=3, seed=seed, notify=quiet)[0] for seed in (1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight) and first.classifier.weight.std() > 0
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)


def test_a_head_for_other_classes_is_replaced(tmp_path):
    folder = str(make(tmp_path, tf.BertForSequenceClassification, bert_config(num_labels=5), texts.word_tokenizer()))
    model, _, kind = models.load_model(folder, num_labels=2, notify=quiet)
    assert kind == "classification" and model.classifier.weight.shape == (2, 16)
    assert models.fresh_parameters(model) == ("classifier.bias", "classifier.weight")
    kept, *_ = models.load_model(folder, num_labels=5, notify=quiet)
    assert models.fresh_parameters(kept) == ()


def test_a_decoder_as_classifier_finds_its_padding(tmp_path):
    model, tokenizer, kind = models.load_model(str(gpt2(tmp_path)), "classification", num_labels=2, notify=quiet)
    assert kind == "classification" and model.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        short = model(input_ids=torch.tensor([[20, 21, 22]])).logits
        padded = model(input_ids=torch.tensor([[20, 21, 22, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
    assert torch.allclose(short, padded, atol=1e-6)  # float32 rounding


def test_a_classifier_needs_labels(tmp_path):
    folder = str(bert(tmp_path))
    assert "the rows have no labels" in refuse(lambda: models.load_model(folder))
    assert "needs labelled rows" in refuse(lambda: models.load_model(folder, "classification"))
    assert "unknown kind 'casual'" in refuse(lambda: models.load_model(folder, "casual"))


def test_a_kind_without_a_head_names_the_kinds_there_are(tmp_path):
    message = refuse(lambda: models.load_model("embedded", "masked"))
    assert message == "model 'embedded' (llama) has no masked language-model head: it can be causal or classification"
    assert "(t5) has no causal language-model head" in refuse(lambda: models.load_model(str(t5(tmp_path / "t5")), "causal"))
    folder = str(bert(tmp_path / "bert"))
    assert "head: it can be causal, masked or classification" in refuse(lambda: models.load_model(folder, "seq2seq"))


def test_position_ids_only_where_they_count_from_zero():
    with torch.random.fork_rng(devices=[]):
        small = {"vocab_size": 50, **WIDE, "pad_token_id": 1}
        roberta_decoder = tf.RobertaForCausalLM(tf.RobertaConfig(**small, is_decoder=True))
        neo = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, **WIDE))
        import peft

        wrapped = peft.get_peft_model(neo, peft.LoraConfig(target_modules=["q_proj"]))
    assert not models.wants_position_ids(roberta_decoder)
    assert models.wants_position_ids(neo) and models.wants_position_ids(wrapped)


# -- names and bad folders


def test_names(tmp_path, monkeypatch):
    assert models.resolve("gpt2") == "gpt2" and models.resolve("owner/name-1.5") == "owner/name-1.5"
    folder = gpt2(tmp_path / "my-model")
    assert models.resolve(str(folder)) == str(folder)
    assert f"did you mean '{folder}'" in refuse(lambda: models.resolve(str(tmp_path / "my-modl")))
    monkeypatch.chdir(tmp_path)
    assert models.resolve("my-model") == "my-model"
    assert "there is no model folder" in refuse(lambda: models.resolve("./absent"))
    assert "there is no model folder" in refuse(lambda: models.resolve("my-model/absent"))
    assert "there is no model folder" in refuse(lambda: models.resolve("a b"))
    assert "there is no model folder" in refuse(lambda: models.resolve(""))
    assert "is a file" in refuse(lambda: models.resolve("my-model/config.json"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    assert "no config.json (it holds notes.txt)" in refuse(lambda: models.resolve("other"))
    (tmp_path / "other" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert "give its base model ('owner/base')" in refuse(lambda: models.resolve("other"))
    assert models.describe_source(str(folder)) == "my-model" and models.describe_source("owner/name") == "owner/name"


def test_a_folder_without_tokenizer(tmp_path):
    folder = make(tmp_path, tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    message = refuse(lambda: models.load_model(str(folder)))
    assert "has no tokenizer" in message and "save_pretrained" in message


def test_damaged_folders(tmp_path):
    folder = gpt2(tmp_path / "a")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refuse(lambda: models.load_model(str(folder), notify=quiet))
    weights.write_bytes(b"abc")
    assert "no safetensors file" in refuse(lambda: models.weights_bytes(str(folder)))
    weights.unlink()
    assert "cannot be read" in refuse(lambda: models.load_model(str(folder), notify=quiet))
    torch.save({}, folder / "pytorch_model.bin")
    assert "never pickles" in refuse(lambda: models.load_model(str(folder), notify=quiet))
    (folder / "config.json").write_text("{")
    assert "its configuration cannot be read" in refuse(lambda: models.load_config(str(folder)))
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "its configuration cannot be read" in refuse(lambda: models.load_config(str(folder)))


def test_code_of_a_model_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    assert "trust_remote_code=true" in refuse(lambda: models.load_config(str(tmp_path)))


def test_parts_of_different_models(tmp_path):
    folder = gpt2(tmp_path / "a")
    make(tmp_path / "b", tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    texts.byte_tokenizer().save_pretrained(tmp_path / "b")
    assert "351 tokens and the model 50" in refuse(lambda: models.load_model(str(tmp_path / "b"), notify=quiet))
    shutil.copy(bert(tmp_path / "c") / "model.safetensors", folder / "model.safetensors")
    assert "belong to different models" in refuse(lambda: models.load_model(str(folder), notify=quiet))


def test_a_hub_name_without_network():
    message = refuse(lambda: models.load_config("owner/no-such-model"))
    assert "check the hub name (owner/name) and the network" in message


def test_missing_pad_token_is_replaced_with_a_notice(tmp_path):
    tokenizer = texts.byte_tokenizer()
    tokenizer.pad_token = None
    folder = make(tmp_path, tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2), tokenizer)
    lines: list[str] = []
    assert models.load_tokenizer(str(folder), notify=lines.append).pad_token == "</s>"
    assert len(lines) == 1 and "no pad token" in lines[0]
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "no pad, end or unknown token" in refuse(lambda: models.load_tokenizer(str(folder)))


def test_a_folder_never_touches_the_network(tmp_path, monkeypatch):
    import huggingface_hub.constants

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    folder = str(llama(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    models.load_model(folder, notify=quiet)
    models.weights_bytes(folder)


def test_loading_is_silent(tmp_path, capfd):
    folder = str(bert(tmp_path))
    capfd.readouterr()
    verbosity, bars = tf.utils.logging.get_verbosity(), tf.utils.logging.is_progress_bar_enabled()
    models.load_model(folder, num_labels=2, notify=quiet)
    assert capfd.readouterr() == ("", "")
    assert (tf.utils.logging.get_verbosity(), tf.utils.logging.is_progress_bar_enabled()) == (verbosity, bars)


# -- sizes


def test_sizes_from_the_configuration_alone(tmp_path):
    folder = llama(tmp_path)
    from_file = models.weights_bytes(str(folder), "float32")
    (folder / "model.safetensors").unlink()
    head = 400 * 16 * 4  # AutoModel has no output head
    assert models.weights_bytes(str(folder), "float32") == from_file - head


def test_context_lengths():
    assert models.context_length(tf.OPTConfig(max_position_embeddings=2048)) == 2048
    assert models.context_length(tf.GPT2Config(n_positions=1024)) == 1024
    assert models.context_length(tf.RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert models.context_length(tf.BertConfig(max_position_embeddings=512)) == 512
    assert models.context_length(tf.T5Config()) is None and models.context_length(tf.BloomConfig()) is None
    tokenizer = texts.byte_tokenizer()
    tokenizer.model_max_length = 128
    assert models.context_length(tf.GPT2Config(n_positions=1024), tokenizer) == 128
    assert models.context_length(tf.T5Config(), tokenizer) == 128
    tokenizer.model_max_length = int(1e30)
    assert models.context_length(tf.GPT2Config(n_positions=1024), tokenizer) == 1024


def test_free_memory_respects_the_control_group(tmp_path, monkeypatch):
    import psutil

    assert 0 < models.available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(models, "_CONTROL_GROUP", tmp_path)
    unlimited = models.available_memory()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")
    assert models.available_memory() == 500_000 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert models.available_memory() > 500_000


# -- real models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "tinystories-instruct-3m-chat"])
def test_shared_models(name):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    model, tokenizer, kind = models.load_model(str(folder), notify=quiet)
    assert kind == "causal" and models.fresh_parameters(model) == ()
    assert models.weights_bytes(str(folder)) == sum(parameter.numel() * 4 for parameter in model.parameters())
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 5
