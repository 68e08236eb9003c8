"""VeLoRA as an adapter, and schemes whose inputs are projected: SSF and Hydra. What they compute, save, merge and equal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from families import batch, make
from smidgen import adapt, optim, quantised
from smidgen.activations import velora
from smidgen.activations._compressed import held
from smidgen.activations._projection import Projection, address
from smidgen.activations._scale import ProjectedScale
from smidgen.activations._vectors import FILE
from smidgen.adapt._peft import with_adapter
from smidgen.config import ConfigError
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine

SCHEMES = ["velora", "ssf", "hydra"]


def built(scheme, family="llama-untied", seed=3, **options):
    kind, model = make(family)
    module = adapt.get(scheme)
    return kind, module.build(model, module.Config(**options), seed=seed)


def trained(kind, found, method="adamw", steps=3, **options):
    opt = optim.get(method).build(found.view, optim.get(method).Config(**{"lr": 1e-2, **options}))
    engine = Engine(found.model, found.view, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [opt.step(ModelObjective(engine, [batch(kind, labels="all")])) for _ in range(steps)]


def logits(model, kind):
    data = {k: v for k, v in batch(kind).items() if k != "labels"}
    if kind == "seq2seq":
        data["decoder_input_ids"] = torch.arange(4).expand(3, 4)
    with torch.no_grad():
        return model.eval()(**data).logits


@pytest.mark.parametrize("family", ["llama-tied", "opt-untied", "gpt2", "t5-tied", "roberta-classification"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_starts_as_the_model_trains_saves_and_merges(scheme, family, tmp_path):
    kind, plain = make(family)
    _, found = built(scheme, family)
    assert torch.equal(logits(found.model, kind), logits(plain, kind))
    losses = trained(kind, found, steps=6)
    assert min(losses) < losses[0]
    end = logits(found.model, kind)
    assert not torch.allclose(end, logits(plain, kind), atol=1e-3)
    merged = found.merged()
    assert type(merged) is type(plain) and set(dict(merged.named_parameters())) == set(dict(plain.named_parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    assert torch.allclose(logits(merged, kind), end, atol=1e-4)
    found.save(tmp_path)
    _, again = built(scheme, family, seed=5)
    again.load(tmp_path)
    assert torch.equal(logits(again.model, kind), end)


# -- velora as an adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"groups": 4}, {"size": 7}, {"groups": 4, "per_group": True}])
def test_the_adapter_is_full_fine_tuning_with_compressed_adam(options):
    """The same vectors, gradients and steps: its merged weights are those of full fine-tuning."""
    kind, found = built("velora", **options)
    names = {f"{name}.weight" for name in found.adapters}
    model = make("llama-untied")[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    view = ParamView.of_model(model)
    policy = velora.build(model, velora.Config(**options), view=view, seed=3)
    full = optim.get("velora_adamw").build(view, lr=1e-2, max_grad_norm=0.1)
    engine = Engine(model, view, kind)
    wanted = [full.step(ModelObjective(engine, [batch(kind, labels="all")])) for _ in range(4)]
    losses = trained(kind, found, steps=4, max_grad_norm=0.1)
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert all(torch.equal(found.vectors.projections[n].v, policy.projections[n].v) for n in names)
    merged, start = dict(found.merged().named_parameters()), dict(make("llama-untied")[1].named_parameters())
    for name in names:  # queries and keys have gradients near nothing, whose signs Adam magnifies
        close = (merged[name] - view[name].tensor).abs() < 1e-4
        assert not torch.equal(merged[name], start[name]) and close.float().mean() > (
            0.5 if ".q_" in name or ".k_" in name else 0.98
        )


def test_along_v_its_gradients_are_autograds():
    kind, found = built("velora", groups=5, along="v")
    trained(kind, found, steps=1)
    name = "model.layers.0.mlp.down_proj"
    adapter, x = found.adapters[name], torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.zeros(2, 3, 24)
    g = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(adapter(x, y), [x, adapter.A], g)
    theirs = torch.autograd.grad(F.linear(x, adapter.A @ adapter.directions()), [x, adapter.A], g)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_it_saves_projections_only():
    _, found = built("velora", groups=4)
    layer = found.model.model.layers[0].self_attn
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in found.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    assert sum(size for place, size in sizes.items() if place not in known) == 10 * 4 * 4 and len(kept) == 3


@pytest.mark.parametrize("code", ["nf4", "int8"])
def test_over_quantised_weights_it_trains_and_peft_reads_it(code, tmp_path):
    """With v of the first batch, exported as PEFT's LoRA, and merged into the unquantised base alone."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(model):
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and "layers" in name:
                with torch.random.fork_rng():
                    made = (
                        bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                        if code == "nf4"
                        else bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                    )
                kind = bnb.nn.Params4bit if code == "nf4" else bnb.nn.Int8Params
                options = {"quant_type": "nf4"} if code == "nf4" else {"has_fp16_weights": False}
                made.weight = kind(module.weight.data.clone(), requires_grad=False, **options)
                model.set_submodule(name, made.to("cpu"))
        quantised.steady(model)
        return model.eval()

    kind, model = make("llama-untied")
    plain = make("llama-untied")[1]
    found = adapt.get("velora").build(quantise(model), adapt.get("velora").Config(groups=4))
    codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    assert len(codes) == 14
    losses = trained(kind, found, steps=6)
    assert losses[-1] < losses[0] and all(torch.equal(codes[n], p) for n, p in model.named_parameters() if n in codes)
    with pytest.raises(ConfigError, match="peft-lora"):
        found.merged()
    found.save(tmp_path)
    theirs = with_adapter(quantise(make("llama-untied")[1]), tmp_path)
    assert torch.allclose(logits(theirs, kind), logits(found.model, kind), atol=1e-4)
    merged = with_adapter(plain, tmp_path).merge_and_unload()
    W = dict(merged.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    adapter = found.adapters["model.layers.1.mlp.up_proj"]
    base = make("llama-untied")[1].model.layers[1].mlp.up_proj.weight
    assert torch.allclose(W, base + adapter.A @ adapter.directions(), atol=1e-6)


def test_vectors_of_a_journal_or_a_folder_without_them_are_refused(tmp_path):
    kind, found = built("velora", groups=4)
    with pytest.raises(ConfigError, match="init=random"):
        found.begin(optim.get("zo_sgd").build(found.view))
    trained(kind, found, steps=1)
    found.save(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ConfigError, match="holds no velora"):
        built("velora", groups=4)[1].load(tmp_path)
    with pytest.raises(ConfigError, match="no adapter of"):
        built("velora", groups=3)[1].load(tmp_path)


# -- projected inputs of other schemes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups,size", [(4, 3), (5, 3), (13, 1)])
def test_a_scales_gradient_is_that_of_the_projected_input(dtype, groups, size):
    width = 13 if groups != 4 else 12
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 5, width, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    scale, shift = (torch.randn(width, generator=generator).requires_grad_() for _ in range(2))
    p = Projection("features", width, groups, size)
    p.choose(x.detach(), None, "mean", False, address(0, 0))
    z = p.project(x)
    rebuilt = (z[:, :, None] * p.v).flatten(1)[:, :width].view(2, 5, width)
    y = ProjectedScale.apply(x, scale, shift, z, p.v)
    exact = x * scale.to(dtype) + shift.to(dtype)
    assert torch.equal(y, exact)
    dx, dscale, dshift = torch.autograd.grad(y, [x, scale, shift], g)
    assert torch.equal(dx, torch.autograd.grad(exact, x, g)[0])
    near = {"atol": 1e-5 if dtype != torch.bfloat16 else 5e-2, "rtol": 1e-5 if dtype != torch.bfloat16 else 2e-2}
    assert torch.allclose(dscale.double(), (g.double() * rebuilt.double()).sum((0, 1)), **near)
    assert torch.allclose(dshift.double(), g.double().sum((0, 1)), **near)


@pytest.mark.parametrize("scheme,part", [("ssf", ".ssf.features.scale"), ("hydra", ".A.weight"), ("head", "lm_head.weight")])
def test_the_policy_takes_the_inputs_of_a_schemes_layers(scheme, part):
    """Scales, both branches of Hydra; of a head alone nothing is left to compress."""
    kind, found = built(scheme)
    if scheme == "head":  # its gradient needs hidden states at label positions, which the loss holds in any case
        with pytest.raises(ConfigError, match="finds nothing to compress"):
            velora.build(found.model, velora.Config(groups=4), view=found.view)
        return
    policy = velora.build(found.model, velora.Config(groups=4), view=found.view)
    losses = trained(kind, found, "velora_adamw", steps=8)
    assert losses[-1] < losses[0]
    taken = {*policy.chosen, *policy.scales}
    assert taken and taken == {e.name for e in found.view if e.name.endswith(part)}
    assert all(held(e.tensor) is None and e.tensor.grad is None for e in found.view)


def test_sparse_deltas_are_gathered_from_the_compressed_gradient():
    """The entries of U (x) v at the deltas' positions; candidates for growth come from it too, and it trains."""
    kind, found = built("spiel", density=0.2, every=4, collect=2)
    policy = velora.build(found.model, velora.Config(groups=4), view=found.view)
    assert len(policy.sparse) == 14 and not policy.chosen
    view, data = found.view, batch(kind, labels="all")
    ModelObjective(Engine(found.model, view, kind), [data]).backward(dropout=False)
    ours = {e.name: e.tensor.grad.clone() for e in view}
    plain = make("llama-untied")[1]
    full = ParamView.of_model(plain)
    dense = velora.build(plain, velora.Config(groups=4), view=full)
    ModelObjective(Engine(plain, full, kind), [data]).backward(dropout=False)
    for name, module in policy.sparse.items():
        wanted = held(dense.chosen[name.replace(".delta", ".weight")].weight).dense().flatten()[module.site.index.long()]
        assert torch.allclose(ours[name], wanted, atol=1e-6), name
    for entry in view:
        entry.tensor.grad = None
    before = {name: module.site.index.clone() for name, module in policy.sparse.items()}
    opt = optim.get("sparse_adamw").build(view, lr=2e-2)
    found.begin(opt)
    losses = []
    for _ in range(12):
        losses.append(opt.step(ModelObjective(Engine(found.model, view, kind), [data])))
        found.after_step(opt, 12)
    assert losses[-1] < 0.98 * losses[0]
    assert any(not torch.equal(before[name], module.site.index) for name, module in policy.sparse.items())
