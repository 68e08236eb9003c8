"""Tuning over a quantised base on the CPU: engines against dense twins, whole runs, resume, replay, PEFT's files, refusals."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers as tf
from torch import nn

import smidgen
from families import batch
from smidgen import inference, models, noise, quantised
from smidgen.adapt import full
from smidgen.adapt._over_quantised import OverQuantised
from smidgen.adapt._peft import with_adapter
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError
from smidgen.config_file import load
from smidgen.lowrank import LowRank, matrices
from smidgen.objective import ModelObjective
from smidgen.optim.es import ES
from smidgen.optim.lozo import LOZO
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.provenance import base_sha256
from test_models import bert_masked, gpt2, llama, quiet
from test_run import labelled

pytest.importorskip("bitsandbytes")

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert_masked}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def opened(folder, quantise, kind="causal", **options):
    return models.load_model(str(folder), kind, "float32", quantise=quantise, notify=quiet, **options)[0]


def twin(over: OverQuantised, folder, kind="causal") -> tuple[nn.Module, ParamView]:
    """The same model in float32, with the values of the codes in its plain linear layers, and the same tensors tuned."""
    model = opened(folder, None, kind)
    for name, module in quantised.layers(over.model).items():
        plain = model.get_submodule(name)
        W = quantised.dequantise(module, dtype=torch.float32)
        plain.weight.data.copy_(W if isinstance(plain, nn.Linear) else W.T)
    return model, ParamView.of_model(model, tuned=lambda name: name in over.view.entries)


def directions(view: ParamView, count: int, rank: int = 2, step: int = 3) -> list[LowRank]:
    return [LowRank(5, step, i, view.ids, matrices(view), rank, 0) for i in range(count)]


@pytest.mark.parametrize("name,quantise", [("llama", "nf4"), ("llama", "int8"), ("bert", "nf4")])
def test_both_engines_give_the_losses_of_a_dense_twin(tmp_path, name, quantise):
    kind = "masked" if name == "bert" else "causal"
    folder = MODELS[name](tmp_path / "model")
    over = full.build(opened(folder, quantise, kind), full.Config())
    held = base_sha256(over.model)
    dense, view = twin(over, folder, kind)
    data, at = batch(kind), noise.Address(0, 0, 0, 0, noise.ROUND)
    plain, single = Engine(dense, view, kind), Engine(over.model, over.view, kind)
    batched = BatchedEngine(over.model, over.view, kind)
    for step in range(2):
        Z = directions(view, 5, step=step)
        probes = [(), *(((z, s * 1e-2),) for z in Z[:2] for s in (1, -1))]
        slow = torch.stack([plain.losses(data, p).nll for p in probes])
        one = torch.stack([single.losses(data, p).nll for p in probes])
        many = torch.stack([found.nll for found in batched.together(data, probes)])
        assert batched._reason is None
        assert (slow[1] - slow[0]).abs().max() > 1e-4
        # float32 sums of some tens of products in another order: ten times their rounding
        torch.testing.assert_close(one, slow, rtol=0, atol=1e-5)
        torch.testing.assert_close(many, slow, rtol=0, atol=1e-5)
        moved = [(z, 1e-2 * c) for z, c in zip(Z, (1.0, -2.0, 0.5, 1.5, -1.0), strict=True)]
        over.view.apply_(moved, at=at)  # 10 columns a step, so that the second is past the smaller side, 16
        view.apply_(moved, at=at, rounding="nearest")
    assert {e.addend.rank for e in over.view} == {16}
    assert base_sha256(over.model) == held


def test_torchao_int8_gives_the_losses_of_a_dense_twin(tmp_path, monkeypatch):
    api = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr("smidgen.linear.SMALLEST", 1)
    monkeypatch.setattr("smidgen.linear._available", lambda: True)  # on any processor
    model = opened(llama(tmp_path / "model"), None)
    api.quantize_(model, api.Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "proj" in name)
    over = full.build(model, full.Config())
    dense, view = twin(over, tmp_path / "model")
    data, held = batch("causal"), base_sha256(model)
    probes = [((z, s * 1e-2),) for z in directions(view, 2) for s in (1, -1)]
    slow = torch.stack([Engine(dense, view).losses(data, p).nll for p in probes])
    engine = BatchedEngine(model, over.view)
    many = torch.stack([found.nll for found in engine.together(data, probes)])
    assert engine._reason is None and base_sha256(model) == held
    torch.testing.assert_close(many, slow, rtol=0, atol=1e-5)


def test_gpt2_has_addends_and_the_file_is_pefts(tmp_path):
    """Conv1D layers become quantised linear ones; stock PEFT computes what we do from the saved adapter."""
    folder = gpt2(tmp_path / "model")
    over = full.build(opened(folder, "nf4"), full.Config(only="attn|fc"))
    Z = directions(over.view, 2)
    over.view.apply_(
        [(Z[0], 0.05), (Z[1], -0.03)], at=noise.Address(0, 0, 0, 0, noise.ROUND), names=list(over.view.entries)[:3]
    )
    over.save(tmp_path / "adapter")
    data = {"input_ids": torch.arange(3, 15)[None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    with torch.no_grad():
        ours = over.model(**data).logits
        stock = with_adapter(opened(folder, "nf4"), tmp_path / "adapter").eval()
        torch.testing.assert_close(stock(**data).logits, ours, rtol=0, atol=1e-5)
    again = full.build(opened(folder, "nf4"), full.Config(only="attn|fc"))
    again.load(tmp_path / "adapter")
    assert [e.addend.rank for e in again.view] == [e.addend.rank for e in over.view]
    with torch.no_grad():
        assert torch.equal(again.model(**data).logits, ours)
    with pytest.raises(ConfigError, match=r"this run does not|no adapter of"):
        full.build(opened(folder, "nf4"), full.Config(only="attn")).load(tmp_path / "adapter")


def tune(folder, data, run, **options):
    values = {"model": str(folder), "data": str(data), "output": str(run), "train.max_steps": 6, "train.learning_rate": 1e-3}
    values |= {"train.per_device_train_batch_size": 4, "train.eval_steps": 100, "max_length": 24, "dev_rows": 4}
    return smidgen.finetune(load(None, [], {**values, **options}), say=quiet)


@pytest.mark.trainer
@pytest.mark.parametrize("method,quantise,cls", [("lozo", "nf4", LOZO), pytest.param("es", "int8", ES, marks=pytest.mark.slow)])
def test_a_run_resumes_replays_and_opens_bit_for_bit(tmp_path, monkeypatch, method, quantise, cls):
    folder, data = llama(tmp_path / "model"), labelled(tmp_path)
    options = {"method": method, "quantise": quantise, "method_args.interval": 2, "train.save_steps": 3}
    straight = tune(folder, data, tmp_path / "straight", **options)
    real = cls._step

    def dies(self, objective):
        if self.t == 5:
            raise KeyboardInterrupt
        return real(self, objective)

    monkeypatch.setattr(cls, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, data, tmp_path / "run", **options)
    monkeypatch.undo()
    resumed = smidgen.finetune(load(None, [], {"output": str(tmp_path / "run"), "resume": True}), say=quiet)
    replayed = smidgen.replay(str(folder), tmp_path / "run", tmp_path / "rebuilt")
    assert straight["weights_sha256"] == resumed["weights_sha256"] == replayed["weights_sha256"]
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "run", "rebuilt")]
    assert files[0] == files[1] == files[2]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not list(tmp_path.glob("*/checkpoint-*/model.safetensors"))
    found = inference.evaluate_folder(str(tmp_path / "run"), task=None, data=None, split="dev", batch_size=None)
    assert found["loss"] == straight["dev"]["loss"] != straight["before"]["loss"]


@pytest.mark.trainer
@pytest.mark.parametrize(
    "scheme,method,quantise",
    [("lora", "zo_sgd", "int8"), ("lora", "adamw", "nf4"), ("prefix", "adamw", "int8"), ("prompt", "zo_sgd", "nf4")]
    + [
        pytest.param(*case.split(), marks=pytest.mark.slow)
        for case in ("lora lozo int8", "prefix zo_sgd nf4", "prompt adamw nf4", "bitfit adamw nf4", "lora adamw int8")
    ],
)
def test_adapters_are_tuned_over_a_quantised_base(tmp_path, scheme, method, quantise):
    folder = (gpt2 if scheme == "bitfit" else llama)(tmp_path / "model")
    kept = opened(folder, quantise)
    rate = {"train.learning_rate": 0.05} if method == "adamw" else {}
    found = tune(folder, labelled(tmp_path), tmp_path / "run", scheme=scheme, method=method, quantise=quantise, **rate)
    assert found["dev"]["loss"] != found["before"]["loss"]
    assert method != "adamw" or found["dev"]["loss"] < found["before"]["loss"]
    loaded, _ = inference.open_folder(str(tmp_path / "run"))
    held = quantised.layers(loaded.adapted.model)
    assert len(held) == len(quantised.layers(kept)) > 0
    for mine, base in zip(held.values(), quantised.layers(kept).values(), strict=True):
        for name, tensor in quantised.stored(base).items():
            assert torch.equal(quantised.stored(mine)[name], tensor)


@pytest.mark.trainer
def test_a_new_head_is_tuned_whole_beside_the_addends(tmp_path):
    folder = llama(tmp_path / "model")
    options = {"kind": "classification", "quantise": "nf4", "method": "lozo", "method_args.interval": 3}
    found = tune(folder, labelled(tmp_path), tmp_path / "run", **options)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"] and config["r"] == 4
    loaded, _ = inference.open_folder(str(tmp_path / "run"))
    assert [e.name for e in loaded.adapted.view if e.addend is None] == ["score.weight"]
    measured = inference.evaluate_folder(str(tmp_path / "run"), task=None, data=None, split="dev", batch_size=None)
    assert measured["loss"] == found["dev"]["loss"]


def test_what_would_write_quantised_weights_is_refused(tmp_path, monkeypatch):
    folder, data = llama(tmp_path / "model"), labelled(tmp_path)
    with pytest.raises(ConfigError, match=r"quantise = nf4: .* zo_sgd writes all of them.*lozo.*--scheme lora"):
        tune(folder, data, tmp_path / "run", quantise="nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed: pip install 'smidgen\[eight-bit\]'"):
        tune(folder, data, tmp_path / "run", quantise="int8", scheme="lora")
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    over = full.build(opened(folder, "nf4"), full.Config())
    name, at = next(iter(over.view.entries)), noise.Address(0, 0, 0, 0, noise.ROUND)
    for write in (
        lambda: over.view.write_(name, torch.zeros(()), at=at),
        lambda: over.view.edit_(name, lambda w: None, at=at),
        lambda: over.view.apply_([(directions(over.view, 1)[0].dense, 1.0)], at=at),
        lambda: over.view.snapshot(),
        lambda: over.begin(smidgen.optim.get("zo_sgd").build(over.view)),
    ):
        with pytest.raises(ConfigError, match="is quantised and cannot be written: take a method with low-rank steps"):
            write()
    with pytest.raises(ConfigError, match="cannot decay: set weight_decay to 0"):
        over.begin(LOZO(over.view, weight_decay=0.1))
    with pytest.raises(ConfigError, match="is quantised and has no gradient"):
        ModelObjective(Engine(over.model, over.view), [batch("causal")]).backward()
    with pytest.raises(ConfigError, match="matches no quantised matrix"):
        full.build(opened(folder, "nf4"), full.Config(only="norm"))
    with pytest.raises(ConfigError, match=r"--format merged --base MODEL"):
        over.merged()


@pytest.mark.trainer
def test_a_stored_quantised_model_stays_so(tmp_path):
    folder = llama(tmp_path / "model")
    opened(folder, "nf4").save_pretrained(tmp_path / "stored")
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "stored")
    with pytest.raises(ConfigError, match="are stored quantised: leave quantise out"):
        opened(tmp_path / "stored", "nf4")
    assert base_sha256(opened(tmp_path / "stored", None)) == base_sha256(opened(folder, "nf4"))


def test_the_estimate_of_the_weights_knows_the_codes(tmp_path):
    folder = llama(tmp_path / "model")
    plain, nf4, int8 = (models.weights_bytes(str(folder), "float32", quantise=q) for q in (None, "nf4", "int8"))
    linear = sum(a * b for a, b in map(quantised.shape, quantised.layers(opened(folder, "int8")).values()))
    assert int8 == plain - 3 * linear and 0.5 * linear < nf4 - (int8 - linear) < 0.53 * linear
    assert models.load_model(str(folder), "causal", "float32", notify=quiet)[0].num_parameters() == quantised.numel(
        opened(folder, "nf4")
    )


@pytest.mark.slow
@pytest.mark.trainer
@pytest.mark.parametrize("scheme,quantise", [("full", "nf4"), ("full", "int8"), ("lora", "nf4")])
def test_exports_over_a_quantised_base_are_reloaded_by_stock_libraries(tmp_path, scheme, quantise):
    from smidgen.export import export

    folder = llama(tmp_path / "model")
    tune(folder, labelled(tmp_path), tmp_path / "run", scheme=scheme, method="lozo", quantise=quantise)
    assert export(tmp_path / "run", tmp_path / "adapter", "peft-lora")["loader"] == "peft"
    with pytest.raises(ConfigError, match="--base MODEL, the unquantised model"):
        export(tmp_path / "run", tmp_path / "refused", "merged")
    assert export(tmp_path / "run", tmp_path / "merged", "merged", str(folder))["loader"] == "transformers"
