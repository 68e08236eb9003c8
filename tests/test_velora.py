"""VeLoRA: exact input gradients, projected weight gradients, shared and counted savings, vectors that last."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smidgen
from families import batch, make
from smidgen import activations, adapt
from smidgen.activations import _compressed, _recompute, velora
from smidgen.activations._linear import ProjectedLinear
from smidgen.activations._projection import Projection, address
from smidgen.config import ConfigError, RunConfig
from smidgen.objective import ModelObjective
from smidgen.optim.adamw import AdamW
from smidgen.optim.velora_adamw import VeLoRAAdamW
from smidgen.params import ParamView, shapes
from smidgen.probing import Engine


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projection(x, groups, size, init="mean", per_group=False, valid=None):
    found = Projection("layer", x.shape[-1], groups, size)
    found.choose(x, valid, init, per_group, address(3, 5))
    return found


def install(model, **options):
    return velora.build(model, velora.Config(**options), view=ParamView.of_model(model), seed=1)


def backward(model, kind, data, **options):
    """(loss, dense gradients, compressed gradients) of one back-propagation."""
    view = ParamView.of_model(model)
    with torch.enable_grad():
        loss = ModelObjective(Engine(model, view, kind), [data]).backward(dropout=False)
    dense = {e.name: e.tensor.grad for e in view if e.tensor.grad is not None}
    compressed = {e.name: _compressed.held(e.tensor) for e in view if _compressed.held(e.tensor) is not None}
    model.zero_grad()
    _compressed.drop(e.tensor for e in view)
    return loss, dense, compressed


class Saved:
    """Storages that autograd saves, parameters left out."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in self.known:
            self.sizes[place] = tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def total(self):
        return sum(self.sizes.values())


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 2, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_input_and_bias_gradients_are_autograds_bit_for_bit(shape, bias, dtype):
    x, w = draw(*shape, dtype=dtype).requires_grad_(), draw(6, 12, seed=1, dtype=dtype).requires_grad_()
    b = draw(6, seed=2, dtype=dtype).requires_grad_() if bias else None
    y = F.linear(x, w, b)
    g = draw(*y.shape, seed=3, dtype=dtype)
    wanted = torch.autograd.grad(y, [x] if b is None else [x, b], g)
    p = projection(x.detach(), 4, 3)
    again = ProjectedLinear.apply(x, w, b, p.project(x), p.v)
    found = torch.autograd.grad(again, [x] if b is None else [x, b], g)
    assert torch.equal(y, again) and torch.equal(wanted[0], found[0])
    if bias:
        assert torch.allclose(wanted[1], found[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("groups,size", [(4, 3), (5, 3), (3, 5), (13, 1), (1, 13)])
@pytest.mark.parametrize("init", ["mean", "power", "random"])
@pytest.mark.parametrize("per_group", [False, True])
def test_the_weight_gradient_is_the_exact_one_projected_block_by_block(groups, size, init, per_group):
    width = 12 if (groups, size) == (4, 3) else 13
    x, w = draw(2, 5, width), draw(6, width, seed=1).requires_grad_()
    p = projection(x, groups, size, init, per_group)
    rows = p.v.expand(groups, size)
    assert torch.allclose(rows.norm(dim=1), torch.ones(groups, dtype=torch.float64))
    g = draw(2, 5, 6, seed=3)
    ProjectedLinear.apply(x, w, None, p.project(x), p.v).backward(g)
    exact = F.pad(g.flatten(0, 1).T @ x.flatten(0, 1), (0, groups * size - width)).unflatten(1, (groups, size))
    wanted = torch.einsum("ogm,gm,gn->ogn", exact, rows, rows).flatten(1)[:, :width]
    found = _compressed.held(w)
    assert w.grad is None and found.u.shape == (6, groups)
    assert torch.allclose(found.dense(), wanted, atol=1e-12, rtol=0)
    assert torch.allclose(found.norm(), found.dense().norm(), atol=1e-12)
    if size == 1:
        assert torch.allclose(found.dense(), exact.flatten(1), atol=1e-12, rtol=0)
    added = torch.zeros_like(w).detach()
    _compressed.add_outer_(added, found.u, found.v, 1.0)
    assert torch.allclose(added, found.dense(), atol=1e-12, rtol=0)


def test_several_backwards_add_up():
    x, w = draw(4, 6), draw(3, 6, seed=1).requires_grad_()
    p = projection(x, 2, 3)
    for part in (x[:2], x[2:]):
        ProjectedLinear.apply(part, w, None, p.project(part), p.v).sum().backward()
    parts = _compressed.held(w).u.clone()
    _compressed.drop([w])
    ProjectedLinear.apply(x, w, None, p.project(x), p.v).sum().backward()
    assert torch.allclose(parts, _compressed.held(w).u, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_add_up_in_float32(dtype):
    """A sum over tokens beyond float16's range is finite, and has float32's precision."""
    x, w = torch.ones(4096, 64, dtype=dtype), torch.zeros(3, 64, dtype=dtype).requires_grad_()
    p = projection(x, 4, 16)
    ProjectedLinear.apply(x, w, None, p.project(x), p.v).backward(torch.full((4096, 3), 16.0, dtype=dtype))
    assert _compressed.held(w).u.dtype == torch.float32
    assert torch.equal(_compressed.held(w).u, torch.full((3, 4), 4096 * 16.0 * 4.0))  # x . v = 4, exactly


def test_the_mean_is_over_valid_tokens_and_power_iteration_finds_the_first_singular_vector():
    x, valid = draw(3, 4, 12), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    mean = x[valid].unflatten(1, (4, 3)).mean((0, 1)).float()
    assert torch.allclose(projection(x, 4, 3, valid=valid).v[0].float(), mean / mean.norm(), atol=1e-6)
    spiked = x + 5 * draw(3, 4, 4, 1, seed=4).mul(torch.tensor([2.0, -1.0, 2.0])).flatten(2)
    first = torch.linalg.svd(spiked.reshape(-1, 3))[2][0]
    assert torch.allclose((projection(spiked, 4, 3, "power").v[0] @ first).abs(), torch.ones((), dtype=torch.float64))


def test_inputs_that_average_to_zero_are_told(capsys):
    assert torch.allclose(projection(torch.zeros(3, 4), 2, 2).v, torch.full((1, 2), 0.5**0.5))
    assert "average to zero" in capsys.readouterr().err


def test_random_vectors_come_from_an_address():
    x = draw(2, 12)
    assert torch.equal(projection(x, 4, 3, "random").v, projection(2 * x, 4, 3, "random").v)


RANK = """
import sys, torch
from smidgen.activations._projection import Projection, address
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/meet", rank=int(sys.argv[2]), world_size=2)
x = torch.load(sys.argv[1] + "/x.pt")[int(sys.argv[2])]
for init in ("mean", "power"):
    p = Projection("layer", 12, 4, 3)
    p.choose(x, None, init, False, address(0, 0))
    torch.save(p.v, f"{sys.argv[1]}/{init}-{sys.argv[2]}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter, which aborts
"""


def test_ranks_fix_the_vectors_of_all_their_tokens(tmp_path):
    x = draw(2, 5, 12, dtype=torch.float32)
    torch.save(x, tmp_path / "x.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=150) for rank in ranks] == [0, 0]
    for init in ("mean", "power"):
        one, other = (torch.load(tmp_path / f"{init}-{rank}.pt") for rank in range(2))
        assert torch.equal(one, other)
        assert torch.allclose(one, projection(x, 4, 3, init).v, atol=1e-5)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-untied", "opt-untied", "roberta-classification", "t5-untied", "qwen3", "gemma2"])
@pytest.mark.parametrize("options", [{"groups": 5}, {"size": 4, "layers": "value+down"}, {"size": 7, "per_group": True}])
def test_a_model_gets_projected_gradients_where_compressed_and_the_same_bits_elsewhere(family, options):
    kind, model = make(family)
    data = batch(kind, labels="all")
    loss, exact, none = backward(model, kind, data)
    policy = install(model, **options)
    again, dense, compressed = backward(model, kind, data)
    assert loss == again and not none
    assert set(compressed) == set(policy.chosen) and not set(compressed) & set(dense)
    assert set(dense) | set(compressed) == set(exact)
    for name, gradient in dense.items():
        assert torch.allclose(gradient, exact[name], atol=1e-6), name
    for name, found in compressed.items():
        groups, size = policy.config.split(found.width)
        blocks = F.pad(exact[name], (0, groups * size - found.width)).unflatten(1, (groups, size))
        rows = found.v.expand(groups, size)
        wanted = torch.einsum("ogm,gm,gn->ogn", blocks, rows, rows).flatten(1)[:, : found.width]
        assert torch.allclose(found.dense(), wanted, atol=1e-6), name


def test_layers_that_read_one_tensor_share_vectors_and_copy():
    kind, model = make("llama-untied")
    policy = install(model, groups=4)
    backward(model, kind, batch(kind, labels="all"))
    assert len(policy.chosen) == 14 and len(set(map(id, policy.projections.values()))) == 8
    layer = "model.layers.1.self_attn.{}_proj.weight"
    q, k, v, o = (policy.projections[layer.format(part)] for part in "qkvo")
    assert q is k is v and q is not o
    x = draw(2, 5, 24, dtype=torch.float32)
    assert q.project(x) is q.project(x) and q.project(x + 0) is not q.project(x)
    z = q.project(x)
    x.mul_(2)
    assert torch.allclose(q.project(x), 2 * z)  # the same object, changed in place
    del x
    assert q._last is None


def of_model(model, kind, data):
    with Saved(model) as saved, torch.enable_grad():
        loss = Engine(model, ParamView.of_model(model), kind).differentiable(data).nll.sum()
        total = saved.total
        loss.backward()
    model.zero_grad()
    return total


@pytest.mark.parametrize("itemsize,dtype", [(4, torch.float32), (2, torch.bfloat16)])
def test_saved_bytes_of_parts_are_the_formulas(itemsize, dtype):
    """Of one MLP and one norm, and of the whole model as the difference that the policy makes."""
    kind, model = make("llama-untied", dtype)
    policy = install(model, groups=4)
    data = batch(kind, labels="all")
    of_model(model, kind, data)  # vectors are chosen
    layer, tokens = model.model.layers[0], 10
    x = draw(2, 5, 24, dtype=dtype).requires_grad_()
    with Saved(model) as saved:
        layer.mlp(x)
    # one copy of x for gate and up, one of the product for down, gate(x) and up(x) for the product's gradient
    assert saved.total == tokens * itemsize * (4 + 4 + 2 * 40)
    with Saved(model) as saved:
        layer.post_attention_layernorm(x)
    assert saved.total == tokens * itemsize * 24
    with Saved(model) as saved:
        q = layer.self_attn.q_proj(x), layer.self_attn.k_proj(x), layer.self_attn.v_proj(x)
    assert saved.total == tokens * itemsize * 4 and len(q) == 3
    told = policy.saved_bytes(tokens, itemsize)
    # a layer's inputs: of q/k/v, o, gate/up, down
    expected = {"projections": 2 * 4 * 4, "norms": 5 * 24, "gates": 2 * 2 * 40, "activations": 0}
    assert told == {name: tokens * itemsize * count for name, count in expected.items()}


@pytest.mark.parametrize("recompute", ["cheap", "up", "mlp"])
def test_saved_bytes_of_a_model_are_the_formula_and_what_the_policy_does_not_own(recompute):
    """The rest (attention, the head, indices) does not depend on the policy's options."""
    kind, model = make("llama-untied")
    data, plain, rests = batch(kind, labels="all"), None, set()
    plain = of_model(model, kind, data)
    for groups in (3, 4):
        policy = install(model, groups=groups, recompute=recompute)
        of_model(model, kind, data)  # vectors are chosen
        shrunk = of_model(model, kind, data)
        rests.add(shrunk - sum(policy.saved_bytes(27, 4).values()))
        assert shrunk < {"cheap": 0.7, "up": 0.6, "mlp": 0.5}[recompute] * plain
        policy.remove()
    cheap = install(model, groups=4)
    of_model(model, kind, data)
    rests.add(of_model(model, kind, data) - sum(cheap.saved_bytes(27, 4).values()))
    assert len(rests) == 1


def test_relu_saves_a_byte_an_element():
    x = draw(3, 4, dtype=torch.float32).requires_grad_()
    with Saved(nn.Identity()) as saved:
        y = _recompute.relu(x)
    assert saved.total == 12
    assert torch.equal(y, x.relu())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(x.relu().sum(), x)[0])


@pytest.mark.parametrize("recompute", ["cheap", "up", "mlp"])
@pytest.mark.parametrize("family", ["llama-tied", "opt-tied", "gemma2"])
def test_recomputation_gives_the_same_gradients(family, recompute):
    """Up to the order of a norm's sums; OPT has no RMS norm."""
    kind, model = make(family)
    data = batch(kind, labels="all")
    policy = install(model, groups=4, recompute="none")
    _, dense, compressed = backward(model, kind, data)
    policy.remove()
    install(model, groups=4, recompute=recompute)
    _, dense_again, again = backward(model, kind, data)
    assert set(dense) == set(dense_again) and set(compressed) == set(again)
    pairs = [(compressed[n].u, again[n].u) for n in compressed] + [(dense[n], dense_again[n]) for n in dense]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert family != "opt-tied" or all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("scheme,options", [("lora", {"rank": 4, "target_modules": "all-linear"}), ("velora", {"groups": 4})])
def test_a_gated_mlp_with_adapters_saves_nothing_of_its_products(scheme, options, monkeypatch):
    """And is multiplied again some tokens at a time: gradients as without recomputation. Dropout on adapters forbids it."""
    monkeypatch.setattr(_recompute, "_BLOCK", 7 * 40)  # 27 tokens in blocks of 7
    found, saved = [], []
    for recompute in ("none", "up", "mlp"):
        kind, model = make("llama-untied")
        module = adapt.get(scheme)
        adapted = module.build(model, module.Config(**options), seed=0, fresh=[])
        with torch.no_grad():
            for i, e in enumerate(adapted.view):  # LoRA's B and A start from zero
                e.tensor.add_(0.1 * draw(*e.tensor.shape, seed=i, dtype=torch.float32))
        policy = velora.build(adapted.model, velora.Config(groups=4, recompute=recompute), view=adapted.view)
        data = batch(kind, labels="all")
        backward(adapted.model, kind, data)  # vectors are chosen
        saved.append(of_model(adapted.model, kind, data))
        assert policy.saved_bytes(27, 4)["gates"] == (27 * 4 * 2 * 40 if recompute == "up" else 0)
        _, dense, compressed = backward(adapted.model, kind, data)
        found.append({**dense, **{name: c.u for name, c in compressed.items()}})
    assert saved[2] < saved[1] < saved[0] and saved[2] < 0.7 * saved[0]
    for others in found[1:]:
        assert set(found[0]) == set(others) and all(torch.allclose(found[0][n], others[n], atol=1e-6) for n in others)
    parts = adapt.get("lora").build(make("llama-untied")[1], adapt.get("lora").Config(dropout=0.1), seed=0, fresh=[]).model
    assert not any(_recompute.repeatable(m) for m in parts.modules() if hasattr(m, "base_layer"))


def test_checkpointing_gives_equal_gradients():
    kind, model = make("llama-untied")
    data = batch(kind, labels="all")
    install(model, groups=4)
    _, dense, compressed = backward(model, kind, data)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, dense_again, again = backward(model.train(), kind, data)
    assert all(torch.equal(compressed[n].u, again[n].u) for n in compressed)
    assert all(torch.equal(dense[n], dense_again[n]) for n in dense)


def test_inference_is_the_plain_model():
    kind, model = make("llama-untied")
    data = batch(kind)
    with torch.no_grad():
        plain = model(**data).loss
    policy = install(model, groups=4)
    with torch.no_grad():
        assert torch.equal(model(**data).loss, plain)
    assert not policy.projections
    policy.remove()
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_autocast_trains():
    kind, model = make("llama-untied")
    policy = install(model, groups=4)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(kind)).loss.backward()
    assert all(_compressed.held(m.weight).u.isfinite().all() for m in policy.chosen.values())


def test_what_is_tied_shared_or_of_another_kind_stays_as_it_is():
    _, model = make("llama-tied")
    assert "model.embed_tokens.weight" not in install(model).chosen and "forward" not in model.lm_head.__dict__
    _, model = make("llama-untied")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    chosen = install(model, groups=4).chosen
    assert "lm_head.weight" not in chosen and not any("up_proj" in name for name in chosen)
    with pytest.raises(ConfigError, match="finds nothing to compress"):
        install(make("gpt2")[1])
    with pytest.raises(ConfigError, match="finds nothing to compress"):
        install(make("llama-untied")[1], layers="lm_head")
    with pytest.raises(ConfigError, match="regular expression"):
        install(make("llama-untied")[1], layers="(")


def test_a_weight_that_is_read_elsewhere_too_is_refused():
    kind, model = make("llama-untied")
    install(model, groups=4)
    opt = AdamW(ParamView.of_model(model))
    with pytest.raises(ConfigError, match="read by its layer"):
        opt.step(lambda: model(**batch(kind)).loss + model.model.layers[0].mlp.up_proj.weight.sum())


def test_groups_and_size_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        velora.Config(groups=4, size=3)
    assert velora.Config().split(4096) == (32, 128)
    assert velora.Config(groups=32).split(40) == (20, 2)  # as few groups as cover it
    assert velora.Config(size=16).split(40) == (3, 16) and velora.Config(size=16).split(10) == (1, 10)


def test_the_folder_is_listed():
    assert activations.names() == ["velora"]
    with pytest.raises(ConfigError, match="velora"):
        activations.get("velor")


# -- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-untied", "opt-untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_adam_on_a_model_is_adam_on_built_gradients(family, dtype):
    """With eps small against the gradients, to float32's rounding; weight decay and clipping included. Queries and keys
    are left out: their gradients in so small a model are little more than rounding, which Adam magnifies."""
    ends, kind = [], None
    for build in (AdamW, VeLoRAAdamW):
        kind, model = make(family, dtype)
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        policy = install(model, groups=4, layers="v_proj|out_proj|o_proj|fc|mlp")
        view = ParamView.of_model(model)
        opt = build(view, lr=1e-3, eps=1e-12, weight_decay=0.1, max_grad_norm=0.01, rounding="nearest")
        engine = Engine(model, view, kind)
        for _ in range(3):
            opt.step(ModelObjective(engine, [batch(kind, labels="all")]))
        assert opt.outcome.written and opt.outcome.measures["grad_norm"] > 0.01
        assert all(_compressed.held(e.tensor) is None and e.tensor.grad is None for e in view)
        ends.append({n: policy.chosen[n].weight.detach().clone() for n in policy.chosen})
        held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values())
        if build is VeLoRAAdamW:
            assert held == build.state_bytes(policy.gradient_shapes(shapes(view)), opt.config)
    start = make(family, dtype)[1].state_dict()
    for name, one in ends[0].items():
        moved = (one - start[name]).float()
        assert moved.abs().max() > 1e-3
        close = (one - ends[1][name]).abs() <= (1e-5 if dtype == torch.float32 else 2e-2)
        assert close.float().mean() > 0.99, name


def test_a_gradient_that_overflows_writes_nothing():
    kind, model = make("llama-untied", torch.float16)
    install(model, groups=4)
    view = ParamView.of_model(model)
    before = view.snapshot()
    opt = VeLoRAAdamW(view)
    opt.step(lambda: model(**batch(kind)).loss * torch.inf)
    assert not opt.outcome.written and all(torch.equal(before[e.name], e.tensor) for e in view)
    assert all(_compressed.held(e.tensor) is None for e in view)


def test_lora_trains_with_compressed_inputs_of_a():
    kind, model = make("llama-untied")
    scheme = adapt.get("lora")
    adapted = scheme.build(model, scheme.Config(rank=4), seed=0, fresh=[])
    policy = velora.build(adapted.model, velora.Config(groups=4), view=adapted.view)
    assert policy.chosen and all(".lora_A." in name for name in policy.chosen)
    opt = VeLoRAAdamW(adapted.view, lr=1e-3)
    engine = Engine(adapted.model, adapted.view, kind)
    losses = [opt.step(ModelObjective(engine, [batch(kind, labels="all")])) for _ in range(20)]
    assert losses[-1] < losses[0]


# -- runs -------------------------------------------------------------------------------------------------------------


def run(folder, **options):
    values = {
        "task": "reviews",
        "method": "velora_adamw",
        "activations": "velora",
        "activations_args": {"groups": 8},
        "train_rows": 32,
        "dev_rows": 16,
        "test_rows": 16,
        "max_length": 32,
        "output": str(folder),
        "train": {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 3, "eval_steps": 6},
    }
    return smidgen.finetune(RunConfig.model_validate({**values, **options}), say=lambda line: None)


@pytest.mark.trainer
def test_a_resumed_run_is_the_straight_run(tmp_path):
    straight = run(tmp_path / "a")
    assert straight["dev"]["loss"] < straight["before"]["loss"]
    again = run(tmp_path / "b")
    assert again["weights_sha256"] == straight["weights_sha256"]
    folder = tmp_path / "b"
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "result.json").write_text(json.dumps({"status": "interrupted"}))
    vectors = folder / "checkpoint-3" / velora.FILE
    kept = vectors.read_bytes()
    vectors.unlink()
    with pytest.raises(ConfigError, match="holds no velora"):
        smidgen.finetune(RunConfig(output=str(folder), resume=True), say=lambda line: None)
    vectors.write_bytes(kept)
    resumed = smidgen.finetune(RunConfig(output=str(folder), resume=True), say=lambda line: None)
    assert resumed["weights_sha256"] == straight["weights_sha256"]


@pytest.mark.trainer
@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": "zo_sgd"}, "without back-propagation"),
        ({"activations_args": {"group": 3}}, "did you mean 'groups'"),
        ({"activations_args": {"groups": 0}}, "activations_args"),
        ({"activations": "veloar"}, "did you mean 'velora'"),
        ({"activations": None}, "activations_args"),
    ],
)
def test_a_run_refuses_what_does_not_fit(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
