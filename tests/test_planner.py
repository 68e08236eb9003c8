"""The planner: simulated bytes beside real ones, passes as the methods make them, and what a user is told."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, RobertaConfig, T5Config

from families import make
from smidgen import adapt, advice, depths, optim, simulate
from smidgen.cli import app
from smidgen.config import ConfigError
from smidgen.params import ParamView, shapes
from smidgen.planner import Case, Model, Plan, Planner, compress, passes, refused, scratch_bytes
from smidgen.readers import aligned
from smidgen.simulate import Rows

MIB = 1 << 20
LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
CONFIGS = {
    "llama": (LlamaConfig(**LLAMA, num_hidden_layers=9), "causal"),
    "opt": (
        OPTConfig(
            hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_attention_heads=4, vocab_size=300, num_hidden_layers=10
        ),
        "causal",
    ),
    "roberta": (
        RobertaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=300, num_hidden_layers=8),
        "masked",
    ),
}


def traced(config, kind, batch, *, backward, checkpointed=False):
    model = simulate.build(config, kind, torch.float32)
    with simulate.without_storage(model, "cpu"):
        if checkpointed:
            simulate.checkpoint(model)
        return simulate.trace(model, kind, batch, backward=backward)


@pytest.mark.parametrize(
    ("name", "how"), [("opt", "forward"), ("llama", "backward"), ("roberta", "backward"), ("llama", "checkpointed")]
)
def test_a_deep_model_is_what_two_shallow_ones_say(name, how):
    config, kind = CONFIGS[name]

    def once(config):
        return traced(config, kind, Rows(3, 40), backward=how != "forward", checkpointed=how == "checkpointed")

    whole, guessed = once(config), depths.of_depth(config, once)
    assert guessed.weights == whole.weights
    assert guessed.trunk == whole.trunk
    assert guessed.backward == pytest.approx(whole.backward, rel=1e-3)


def test_the_saved_bytes_are_those_that_autograd_saves():
    config, kind = CONFIGS["llama"]
    batch = Rows(2, 24)
    found = traced(config, kind, batch, backward=True)
    model = simulate.build(config, "causal", torch.float32, device="cpu")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    assert loss.requires_grad
    assert found.saved == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "cheap", "up", "mlp"])
def test_a_layers_saved_bytes_under_velora_are_those_of_the_hooks_and_of_the_formula(recompute):
    """What one more layer saves: simulated, counted through saved-tensor hooks, and by the policy's formula, beside which
    attention saves q, k, v, its output, a number a head, and a mask that knows of padding."""
    rows, length, width, heads = 2, 24, 64, 4
    simulated, counted, told, vectors = [], [], [], []
    for layers in (2, 3):
        sizes = {**LLAMA, "num_key_value_heads": heads, "num_hidden_layers": layers}
        fake, model = (simulate.build(LlamaConfig(**sizes), "causal", torch.float32, device=d) for d in ("meta", "cpu"))
        policy = None
        for made in (fake, model):
            policy = compress(adapt.get("full").build(made, adapt.get("full").Config()), {"groups": 8, "recompute": recompute})
        with simulate.without_storage(fake, "cpu"):
            simulated.append(simulate.trace(fake, "causal", Rows(rows, length), backward=True).saved)
        kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

        def pack(t, kept=kept):
            kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t

        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert hidden.requires_grad
        counted.append(sum(kept.values()))
        told.append(sum(policy.saved_bytes(rows * length, 4).values()))
        vectors.append(sum(p.v.nbytes for p in set(policy.projections.values())))
    layer, formula, made_in_it = (one[1] - one[0] for one in (counted, told, vectors))
    assert simulated[1] - simulated[0] == layer + made_in_it  # a simulation sees the vectors made
    attention = 4 * rows * length * (4 * width + heads + length)
    assert (layer == formula + attention) == (recompute != "none")


def test_a_plan_with_velora_needs_less_and_so_does_the_optimizer_that_knows_it():
    planner = Planner(Model(*CONFIGS["llama"]), Rows(16, 64))
    plain, dense, compressed = (
        planner.plan(case).terms for case in (Case("adamw"), Case("adamw", keep="velora"), Case("velora_adamw", keep="velora"))
    )
    assert compressed.total < dense.total < plain.total and dense.optimizer == plain.optimizer
    assert compressed.optimizer < 0.6 * plain.optimizer and compressed.gradients < 0.6 * plain.gradients
    fewer = planner.plan(Case("velora_adamw", keep="velora", activations_options={"groups": 2, "recompute": "mlp"})).terms
    assert fewer.total < compressed.total
    assert "finds nothing to compress" in refused(planner, Case("adamw", "head", "velora"))


def test_recomputation_keeps_less_and_a_frozen_base_less_still():
    planner = Planner(Model(*CONFIGS["llama"]), Rows(16, 64))
    plain, less, lora = (
        planner.plan(case).terms
        for case in (Case("adamw"), Case("adamw", keep="checkpointing"), Case("adamw", "lora", "checkpointing"))
    )
    assert less.over_weights < 0.8 * plain.over_weights and less.total < plain.total
    assert lora.total < less.total < plain.total
    assert plain.optimizer > 2 * plain.weights * 0.99
    assert lora.gradients < plain.gradients / 10


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("zo_sgd", {}, (2, 0, 0, 2)),
        ("zo_sgd", {"sides": 1, "queries": 3}, (4, 0, 0, 4)),
        ("zo_sgd", {"sides": "residual"}, (1, 0, 0, 1)),
        ("zo_conservative", {}, (5, 0, 0, 3)),
        ("es", {"queries": 4}, (8, 0, 0, 8)),
        ("fzoo", {"queries": 4}, (5, 0, 0, 5)),
        ("forward_grad", {}, (0, 0, 1, 0)),
        ("adamw", {}, (0, 1, 0, 0)),
    ],
)
def test_passes_are_counted_on_the_method_itself(method, options, wanted):
    sizes = {"model.layers.0.q_proj.weight": (64, 64), "model.layers.1.q_proj.weight": (64, 64), "model.norm.weight": (64,)}
    p = passes(method, options, sizes)
    assert (p.forwards, p.backwards, p.slopes, p.together) == wanted


def test_a_hybrid_backs_through_its_top_alone():
    planner = Planner(Model(*CONFIGS["llama"]), Rows(4, 64))
    hybrid, whole = planner.plan(Case("hybrid")).terms, planner.plan(Case("sgd")).terms
    assert hybrid.gradients < whole.gradients / 2
    assert hybrid.activations + hybrid.logits < whole.activations + whole.logits


@pytest.mark.parametrize("method", optim.names())
def test_every_method_has_a_plan_or_a_reason(method):
    planner = Planner(Model(*CONFIGS["llama"]), Rows(2, 16))
    found = [refused(planner, Case(method, scheme)) for scheme in ("full", "lora")]
    assert any(isinstance(plan, Plan) for plan in found) or all(isinstance(reason, str) for reason in found)
    for plan in found:
        if isinstance(plan, Plan):
            assert min(plan.terms.values()) >= 0 and plan.terms.total > plan.terms.weights
            assert plan.passes.forwards + plan.passes.backwards + plan.passes.slopes > 0


def test_a_base_in_four_bits_is_smaller_and_its_products_need_a_layer():
    planner = Planner(Model(*CONFIGS["llama"]), Rows(8, 64))
    plain, packed = (planner.plan(Case("adamw", "lora", "checkpointing", quantise=q)) for q in (None, "nf4"))
    linear = 9 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160)
    assert plain.terms.weights - packed.terms.weights == pytest.approx(linear * (4 - 0.516), rel=1e-3)
    assert packed.case.key == "lora_adamw_checkpointed_nf4" and packed.tuned == plain.tuned
    assert packed.terms.over_weights < 1.5 * plain.terms.over_weights


def test_simulations_that_share_a_model_are_those_of_models_of_their_own():
    cases = [Case("adamw", keep="checkpointing"), Case("adamw"), Case("hybrid"), Case("zo_sgd"), Case("adamw", "lora")]
    shared = Planner(Model(*CONFIGS["llama"]), Rows(4, 32))
    for case in [*cases, *reversed(cases)]:
        assert shared.plan(case).terms == Planner(Model(*CONFIGS["llama"]), Rows(4, 32)).plan(case).terms


def test_planning_for_cuda_needs_none():
    assert Planner(Model(*CONFIGS["llama"], device="cuda"), Rows(2, 16)).plan(Case("adamw")).terms.total > 0


def test_what_cannot_be_simulated_is_measured_and_said(monkeypatch, tmp_path, capsys):
    CONFIGS["llama"][0].save_pretrained(tmp_path)

    def fail(*_, **__):
        raise LookupError("no output head")

    monkeypatch.setattr(simulate, "trace", fail)
    monkeypatch.setattr("smidgen.measure.measured", lambda planner, case, threads=None: 5 * MIB)
    with pytest.raises(SystemExit) as end:
        app(["plan", str(tmp_path), "--memory", "1GB", "--length", "32", "--method", "zo_sgd", "--json"])
    found = capsys.readouterr()
    assert end.value.code == 0 and "cannot be simulated (LookupError: no output head)" in found.err
    assert set(json.loads(found.out)["measured"].values()) == {5 * MIB} and "5 MiB" in json.loads(found.out)["recommendation"]


def test_an_encoder_and_decoder_is_simulated_whole():
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0)
    plan = Planner(Model(config, "seq2seq"), Rows(2, 16)).plan(Case("zo_sgd"))
    assert plan.terms.activations > 0


# ---------------------------------------------------------------------------------------------------- what is told


def test_the_recommendation_follows_the_memory():
    planner = Planner(Model(*CONFIGS["opt"]), Rows(8, 128))
    needs = {case.key: planner.plan(case).terms.total for case in advice.PREFERRED}
    rich = advice.advise(planner, 10 * max(needs.values()))
    assert rich.chosen is not None and rich.chosen.case == Case("adamw")
    assert "back-propagation fits" in rich.recommendation()
    poor = advice.advise(planner, int(needs["full_zo_sgd"] * 1.12))
    assert poor.chosen is not None and poor.chosen.case.method in ("lozo", "zo_adam", "zo_sgd", "adamw")
    assert poor.rows[0].fit == "no"
    middle = advice.advise(planner, int(needs["full_adamw_checkpointed"] * 1.15))
    assert middle.rows[0].fit == "no" and "with activation checkpointing" in (middle.change(Case("adamw")) or "")
    nothing = advice.advise(planner, MIB // 4)
    assert nothing.chosen is None and nothing.recommendation().startswith("nothing fits")


@pytest.mark.parametrize(("text", "wanted"), [("8GB", 8 << 30), ("7.5 GiB", 15 << 29), ("512m", 512 << 20), ("4096", 4096)])
def test_sizes(text, wanted):
    assert advice.memory_of(text) == wanted


@pytest.mark.parametrize("text", ["", "eight", "0GB", "-1GB", "8XB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is not a size"):
        advice.memory_of(text)


def test_the_command_reads_no_weights(capsys, tmp_path):
    CONFIGS["llama"][0].save_pretrained(tmp_path)  # a folder with config.json alone
    with pytest.raises(SystemExit) as end:
        app(["plan", str(tmp_path), "--memory", "2GB", "--batch", "2", "--length", "32", "--method", "zo_sgd", "--json"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["scheme"] for row in found["rows"]} == {"full", "lora"}
    assert all(row["bytes"]["total"] == sum(v for k, v in row["bytes"].items() if k != "total") for row in found["rows"])
    with pytest.raises(SystemExit) as end:
        app(["plan", str(tmp_path), "--memory", "100kB", "--method", "zo_sgd", "--length", "32"])
    assert end.value.code == 3
    assert "nothing fits" in capsys.readouterr().out


def test_on_a_gpu_the_scratch_is_a_layer():
    """There a layer's tensors are displaced at once; on a CPU one module's."""
    _, model = make("llama-untied")
    view = ParamView.of_model(model)
    layer = sum(aligned(p.nbytes) for p in model.model.layers[0].parameters())
    largest = max(p.nbytes for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.nbytes
    assert scratch_bytes(model, view, "cuda:0") == layer + head
    assert scratch_bytes(model, view, "cpu") == aligned(largest) + head


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "full"), ("opt", "full"), ("llama", "lora"), ("opt", "bitfit"), ("llama", "spiel")]
)
def test_a_deep_models_tensors_are_known_from_two_shallow_ones(name, scheme):
    config, kind = CONFIGS[name]
    planner = Planner(Model(config, kind), Rows(2, 8))
    found, scratch, count = planner._tuned(scheme, ())
    whole = planner._adapted(config, scheme, {})
    assert found == shapes(whole.view) and count == whole.view.numel()
    assert scratch == scratch_bytes(whole.model, whole.view, "cpu")


def test_numbers_that_are_no_layers_stay():
    """A list beside the layers, and layers of two kinds in turn."""

    def sizes(layers):
        names = [f"a.{i}.x" for i in range(layers)] + [f"b.{i}.y" for i in range(3)] + ["c"]
        shape = {f"a.{i}.x": (2 + (i % 2),) for i in range(layers)} | {"c": (layers * 4, 3)}
        return {n: (shape.get(n, (7,)), torch.float32) for n in names}

    assert depths.deepened(sizes(4), sizes(6), (12, 4, 6)) == sizes(12)
    assert depths.deepened(sizes(5), sizes(7), (13, 5, 7)) == sizes(13)
