"""Weights on disk, in host memory or spread by accelerate: the same bits as a run with all of them in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import dispatch_model
from safetensors.torch import load_file

from families import batch, make
from smidgen import Trainer, batched, finetune, linear, optim, placed
from smidgen.batched import BatchedEngine
from smidgen.config import ConfigError, RunConfig
from smidgen.directions import Dense
from smidgen.layerwise import StreamedEngine, engine_of, from_disk, from_host
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.provenance import base_sha256, weights_sha256
from smidgen.reuse import Held
from smidgen.shelves import Shelf, publish
from test_trainer import Rows, arguments

FAMILIES = ["opt-tied", "llama-untied", "gpt2", "bert-masked"]
METHODS = {"zo_sgd": {"queries": 2}, "zo_conservative": {}, "zo_block": {}, "lozo": {}, "zo_sign": {}}
MICRO = [{"rows": 3, "seed": 1}, {"rows": 2, "seed": 2}]


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Loading a model draws from torch's generator. Matrices of these tiny models count as wide, so that dense probes pass one
    after the other, as in any model that would not fit."""
    monkeypatch.setattr(batched, "NARROW", 4)
    with torch.random.fork_rng(devices=[]):
        yield


def on_disk(family: str, tmp_path: Path, **where):
    """(kind, the model's name for `from_pretrained`, the same model left on disk by accelerate)."""
    kind, model = make(family)
    model.save_pretrained(tmp_path / "base")
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "loading"), "dtype": torch.float32, **where}
    return kind, model, type(model).from_pretrained(tmp_path / "base", **options).eval()


def steps(model, kind, method="zo_sgd", count=3, **options):
    view = ParamView.of_model(model)
    engine = engine_of(model, view, kind)
    module = optim.get(method)
    opt = module.build(view, module.Config(lr=1e-4, **options))
    micro = [batch(kind, labels="all", **b) for b in MICRO]
    losses = [opt.step(ModelObjective(engine, micro)) for _ in range(count)]
    opt.merge_()
    return losses, {e.name: e.storage.clone() for e in view}, engine


def same(a, b):
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_disk_takes_the_same_steps(family, tmp_path):
    kind, model, disk = on_disk(family, tmp_path)
    from_disk(disk, tmp_path / "weights")
    assert base_sha256(disk) == base_sha256(model)
    resident, streamed = steps(model, kind, queries=2), steps(disk, kind, queries=2)
    assert isinstance(streamed[2], StreamedEngine) and type(resident[2]) is BatchedEngine
    assert same(resident, streamed)
    assert streamed[2].forwards == resident[2].forwards and streamed[2].tokens == resident[2].tokens
    assert weights_sha256(ParamView.of_model(disk)) == weights_sha256(ParamView.of_model(model))


def test_large_products_take_the_same_kernels(tmp_path, monkeypatch):
    """As in a model of real size with AVX512: the fast product, not torch's, wherever the weights lie."""
    kind, model, disk = on_disk("llama-untied", tmp_path)
    plain = steps(model, kind)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "_available", lambda: True)  # on any processor
    calls = []
    onednn = linear._onednn
    monkeypatch.setattr(linear, "_onednn", lambda *args: (calls.append(1), onednn(*args))[1])
    _, fresh = make("llama-untied")
    resident, many = steps(fresh, kind), len(calls)
    from_disk(disk, tmp_path / "weights")
    _, other = make("llama-untied")
    where = {"model": "disk", "lm_head": "disk"}
    spread = dispatch_model(other, where, main_device="cpu", offload_dir=str(tmp_path / "own"))
    placed.settle(spread, tmp_path / "spread")
    assert many > 0 and len(plain[1]) == len(resident[1])
    calls.clear()
    assert same(resident, steps(disk, kind)) and len(calls) >= many
    calls.clear()
    found = steps(spread, kind)  # whose head the model runs by itself
    assert all(torch.allclose(found[1][n], resident[1][n], atol=1e-7) for n in resident[1]) and len(calls) > many // 2
    ids = {k: batch(kind)[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():  # the wrappers call what they called before
        calls.clear()
        spread(**ids)
        assert not calls


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_the_same_steps(method, tmp_path):
    kind, model, disk = on_disk("opt-tied", tmp_path)
    from_disk(disk, tmp_path / "weights")
    assert same(steps(model, kind, method, **METHODS[method]), steps(disk, kind, method, **METHODS[method]))


def test_each_layer_is_read_once_a_step_for_all_probes_of_all_micro_batches(tmp_path):
    kind, _, disk = on_disk("llama-untied", tmp_path)
    from_disk(disk, tmp_path / "weights")
    _, _, engine = steps(disk, kind, count=1)
    before = engine.stream.read
    micro = [batch(kind, labels="all", **b) for b in MICRO]
    view = engine.view
    opt = optim.get("zo_sgd").build(view, optim.get("zo_sgd").Config(queries=4))
    opt.step(ModelObjective(engine, micro))
    assert engine.stream.read - before == len(disk.smidgen_shelves.layers) == 2


@pytest.mark.parametrize("near", [False, True])
def test_layers_in_host_memory_run_through_copies(near, tmp_path):
    """What a CUDA device does with two buffers, on this CPU: masters are written, copies are made anew."""
    kind, model = make("llama-untied")
    _, host = make("llama-untied")
    from_host(host, torch.device("cpu")) if near else None
    found = steps(host, kind, queries=2)
    assert same(steps(model, kind, queries=2), found)
    if near:
        assert 0 < host.smidgen_stream.near.nbytes() < 3 * sum(p.nbytes for p in host.model.layers[0].parameters())
        with torch.no_grad():  # an ordinary forward sees what was written
            data = batch(kind)
            ids = {k: data[k] for k in ("input_ids", "attention_mask")}
            assert torch.equal(host(**ids).logits, model(**ids).logits)


def test_only_copies_are_read_where_layers_run_on_them(monkeypatch):
    """Masters in host memory cannot be read on a device, not by the self-check either. Here they are NaN."""
    kind, host = make("llama-untied")
    from_host(host, torch.device("cpu"))
    near, masters = host.smidgen_stream.near, {}
    for p in (p for layer in host.model.layers for p in layer.parameters()):
        masters[id(p)] = p.detach().clone()
        p.data.fill_(torch.nan)

    def load(i):
        for (_, _, master), view in zip(near.places[i], near._views(i), strict=True):
            view.copy_(masters[id(master)])

    monkeypatch.setattr(near, "load", load)
    view = ParamView.of_model(host)
    engine = engine_of(host, view, kind)
    data = batch(kind, labels="all")
    seen = []
    ids = {k: data[k] for k in ("input_ids", "attention_mask")}
    engine.check(lambda: seen.append(host(**ids).logits))
    probes = [[(Dense(1, 2, 3, view.ids), s)] for s in (1e-2, -1e-2)]
    found = [losses.nll for part in engine.every([data], probes, [Held()], [None]) for losses in part]
    assert all(torch.isfinite(x).all() for x in (*seen, *found)) and not torch.equal(*found)


SPREAD = {
    "opt-tied": {"model.decoder.embed_tokens": "cpu", "lm_head": "cpu", "model.decoder.embed_positions": "disk",
                 "model.decoder.final_layer_norm": "cpu", "model.decoder.layers.0": "cpu", "model.decoder.layers.1": "disk"},
    "llama-untied": {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
                     "model.rotary_emb": "cpu", "lm_head": "disk"},
}  # fmt: skip


@pytest.mark.parametrize("method", ["zo_sgd", "lozo"])
@pytest.mark.parametrize("family", SPREAD)
def test_a_model_that_accelerate_spreads_takes_the_same_steps(family, method, tmp_path):
    """Probes are hooked inside accelerate's own forward; weights that live in files are written there."""
    kind, model, spread = on_disk(family, tmp_path, device_map=SPREAD[family])
    placed.settle(spread, tmp_path / "weights")
    assert base_sha256(spread) == base_sha256(model)
    found = steps(spread, kind, method)
    # a head that is not at hand is run whole by the model, low-rank probes one at a time: the same up to rounding
    resident = steps(model, kind, method)
    assert all(torch.allclose(found[1][n], resident[1][n], atol=1e-7) for n in resident[1])
    if family == "opt-tied" and method == "zo_sgd":
        assert same(found, resident)
    ids = {k: batch(kind)[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.allclose(spread(**ids).logits, model(**ids).logits, atol=1e-5)


@pytest.mark.trainer
def test_a_trainer_leaves_a_spread_model_where_it_is(tmp_path):
    kind, model, spread = on_disk("opt-tied", tmp_path, device_map=SPREAD["opt-tied"])
    placed.settle(spread, tmp_path / "weights")
    ends = []
    for name, one in (("a", model), ("b", spread)):
        args = arguments(tmp_path / name, max_steps=2)
        trainer = Trainer(model=one, args=args, train_dataset=Rows(), kind=kind, method="zo_sgd", method_args={"lr": 1e-4})
        trainer.train()
        ends.append(weights_sha256(trainer.stepper.view))
    assert ends[0] == ends[1]


def test_all_on_disk_by_accelerate_takes_the_same_steps(tmp_path):
    """Also with accelerate's own dispatch of a model that was in memory."""
    kind, model = make("opt-untied")
    _, other = make("opt-untied")
    spread = dispatch_model(other, {"model": "disk", "lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path / "own"))
    placed.settle(spread, tmp_path / "weights")
    found, resident = steps(spread, kind), steps(model, kind)
    assert all(torch.allclose(found[1][n], resident[1][n], atol=1e-7) for n in resident[1])


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_shelf_is_a_safetensors_file_that_is_written_in_place(tmp_path):
    shapes = {"a": (torch.float32, (3, 5)), "b": (torch.bfloat16, (7,)), "none": (torch.float32, (0, 2))}
    shelf = Shelf.create(tmp_path / "x.safetensors", shapes)
    shelf.tensors["a"].copy_(torch.arange(15.0).view(3, 5))
    shelf.fetch()
    shelf.release()
    shelf.tensors["b"].fill_(2.0)
    shelf.flush()
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.arange(15.0).view(3, 5)) and found["b"].dtype == torch.bfloat16
    assert torch.equal(found["b"], torch.full((7,), 2.0, dtype=torch.bfloat16)) and found["none"].shape == (0, 2)
    assert torch.equal(Shelf(tmp_path / "x.safetensors").tensors["a"], found["a"])
    assert shelf.tensors["a"].data_ptr() % 64 == 0


def test_files_become_a_model_that_transformers_reads(tmp_path):
    kind, _, disk = on_disk("opt-tied", tmp_path)
    from_disk(disk, tmp_path / "weights")
    steps(disk, kind, count=1)
    (tmp_path / "out").mkdir()
    publish(disk, tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), disk.parameters(), strict=True))


# -- runs -------------------------------------------------------------------------------------------------------------


def run(folder: Path, **options) -> dict:
    config = {"task": "reviews", "train_rows": 32, "dev_rows": 8, "test_rows": 8, "threads": 1, "output": str(folder)}
    train = {"max_steps": 3, "per_device_train_batch_size": 4}
    return finetune(RunConfig(**config, train=train, **options), say=lambda line: None)


@pytest.mark.trainer
def test_a_run_with_weights_on_disk_ends_with_the_same_hash(tmp_path):
    resident, disk = run(tmp_path / "resident"), run(tmp_path / "disk", offload="disk")
    assert disk["weights_sha256"] == resident["weights_sha256"] and disk["before"] == resident["before"]
    index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
    assert all((tmp_path / "disk" / name).is_file() for name in index["weight_map"].values())
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "disk").num_parameters() == resident["weights"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offload": "host"}, "torch sees none"),
        ({"offload": "disk", "method": "adamw"}, "adamw needs gradients through all layers"),
        ({"offload": "disk", "method": "forward_grad"}, "forward_grad needs gradients"),
        ({"offload": "disk", "device_map": "auto"}, "both say where weights are"),
        ({"offload": "disk", "quantise": "nf4", "scheme": "lora"}, "leave one of both out"),
        ({"device_map": "auto", "method": "sgd"}, "device_map: sgd needs gradients"),
    ],
)
def test_what_weights_elsewhere_cannot_do_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "x", **options)
