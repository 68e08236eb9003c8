"""Virtual probing: the loss at theta + probe is that of a plainly displaced copy, and theta is never written."""

from __future__ import annotations

import copy
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from families import FAMILIES, batch, make, own_loss
from smidgen import probing
from smidgen.directions import Dense, displace
from smidgen.loss import head_nll
from smidgen.params import ParamView
from smidgen.probing import Engine


def engine_of(model: nn.Module, kind: str) -> Engine:
    return Engine(model, ParamView.of_model(model), kind)


def probe_of(view: ParamView, eps: float = 1e-2, distribution: str = "rademacher"):
    return ((Dense(7, 3, 1, view.ids, distribution), eps),)


def displaced_copy(model: nn.Module, probe) -> nn.Module:
    twin = copy.deepcopy(model)
    for entry in ParamView.of_model(twin):
        displace(probe, entry.name, entry.storage.clone(), entry.storage)
    return twin


def mean(losses) -> torch.Tensor:
    return losses.nll.double().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_at_theta_is_the_models_own(family):
    kind, model = make(family)
    for labels in ("some", "all"):
        data = batch(kind, labels=labels)
        engine = engine_of(model, kind)
        engine.check_batch(data)
        assert torch.allclose(mean(engine.losses(data)).float(), own_loss(model, data), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_equals_displaced_copy_bit_for_bit(family, distribution):
    kind, model = make(family)
    data = batch(kind, labels="all")
    engine = engine_of(model, kind)
    engine.check_batch(data)
    probe = probe_of(engine.view, distribution=distribution)
    twin = displaced_copy(model, probe)
    other = engine_of(twin, kind)
    other.check_batch(data)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got = engine.losses(data, probe)
    assert torch.equal(got.nll, other.losses(data).nll)
    assert torch.equal(got.nll, engine.losses(data, probe).nll)
    assert not torch.equal(got.nll, engine.losses(data).nll)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "t5-tied", "bert-classification", "mixtral"])
def test_probe_equals_displaced_copy_in_16_bit(family, dtype):
    kind, model = make(family, dtype)
    data = batch(kind)
    engine = engine_of(model, kind)
    engine.check_batch(data)
    probe = probe_of(engine.view)
    other = engine_of(displaced_copy(model, probe), kind)
    other.check_batch(data)
    assert torch.equal(engine.losses(data, probe).nll, other.losses(data).nll)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_displaced_at_once_give_the_same_bits(family, monkeypatch):
    kind, model = make(family)
    data = batch(kind, labels="all")
    single = engine_of(model, kind)
    single.check_batch(data)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(probing, "AT_ONCE", ("cpu",))
    engine = engine_of(model, kind)
    engine.check_batch(data)
    some = frozenset(sorted(engine.view.entries)[::2])
    for probe in (probe_of(engine.view), ((Dense(7, 3, 1, engine.view.ids, support=some), 1e-2),)):
        for _ in range(2):  # the second time scratch is that of the first
            assert torch.equal(engine.losses(data, probe).nll, single.losses(data, probe).nll)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_is_displaced_for_itself_inside_a_layer_has_scratch_of_its_own(monkeypatch):
    """An embedding that renormalises its rows is displaced as a whole, while the layer's own copies are in use."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.table = nn.Embedding(9, 4, max_norm=0.5)

        def forward(self, x, ids):
            return self.second(self.first(x) + self.table(ids).mean(1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, input_ids, **_):
            x = torch.ones(len(input_ids), 4)
            for layer in self.layers:
                x = layer(x, input_ids)
            return Namespace(logits=x)

    with torch.random.fork_rng():
        model = Model()
    data = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([[0], [3]])}
    single = Engine(model, ParamView.of_model(model), "classification")
    probe = probe_of(single.view)
    theirs = single.losses(data, probe).nll
    monkeypatch.setattr(probing, "AT_ONCE", ("cpu",))
    ours = Engine(model, ParamView.of_model(model), "classification")
    assert torch.equal(ours.losses(data, probe).nll, theirs)


def test_a_layer_holds_what_runs_inside_it_alone(monkeypatch):
    """What a model calls beside its layers is displaced for itself; embeddings stay row by row."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.beside = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.inside(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layers = nn.Embedding(9, 4), nn.ModuleList([Layer(), Layer()])

        def forward(self, input_ids, **_):
            x = self.table(input_ids).mean(1)
            for layer in self.layers:
                x = layer.beside(layer(x))
            return Namespace(logits=x)

    monkeypatch.setattr(probing, "AT_ONCE", ("cpu",))
    with torch.random.fork_rng():
        model = Model()
    engine = Engine(model, ParamView.of_model(model), "classification")
    data = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([[0], [3]])}
    probe = probe_of(engine.view)
    twin = displaced_copy(model, probe)
    theirs = F.cross_entropy(twin(**data).logits, data["labels"].view(-1), reduction="none")
    assert torch.equal(engine.losses(data, probe).nll, theirs)
    names = {tuple(e.name for e, _, _ in reader.tensors) for reader in engine._groups}
    assert ("layers.0.inside.weight", "layers.0.inside.bias") in names
    assert ("layers.1.beside.weight", "layers.1.beside.bias") in names and ("table.weight",) in names


@pytest.mark.parametrize("family", ["opt-tied", "mixtral", "t5-tied"])
def test_theta_is_put_back_when_the_forward_raises(family):
    kind, model = make(family)
    engine = engine_of(model, kind)
    data = batch(kind)
    engine.check_batch(data)
    objects = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    last = list(model.modules())[-1]

    def fail(*_):
        raise RuntimeError("out of cheese")

    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="cheese"):
        engine.losses(data, probe_of(engine.view))
    handle.remove()
    for name, parameter in model.named_parameters():
        assert parameter is objects[name][0] and torch.equal(parameter, objects[name][1])
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_scratch_is_no_larger_than_the_largest_tuned_tensor():
    kind, model = make("llama-untied")
    engine = engine_of(model, kind)
    data = batch(kind)
    engine.check_batch(data)
    engine.losses(data, probe_of(engine.view))
    largest = max(e.tensor.numel() * 4 for e in engine.view)
    assert 0 < engine.scratch_bytes() <= 2 * largest  # one buffer for modules, one for a block of the head
    inner = max(e.tensor.numel() * 4 for e in engine.view if "embed" not in e.name and "lm_head" not in e.name)
    common = sum(b.numel() for (slot, _), b in engine.scratch.buffers.items() if slot == "common")
    assert common <= inner + 64


def test_embedding_displaces_only_looked_up_rows(monkeypatch):
    from smidgen import lookup

    kind, model = make("opt-untied")
    engine = engine_of(model, kind)
    data = batch(kind)
    engine.check_batch(data)
    seen = []
    original = lookup.displace_rows
    monkeypatch.setattr(lookup, "displace_rows", lambda p, name, *a: (seen.append((name, a[1].numel())), original(p, name, *a)))
    whole = []
    full = lookup.displace
    monkeypatch.setattr(lookup, "displace", lambda p, name, *a, **k: (whole.append(name), full(p, name, *a, **k)))
    engine.losses(data, probe_of(engine.view))
    ids = data["input_ids"].numel()
    assert ("model.decoder.embed_tokens.weight", ids) in seen
    assert "model.decoder.embed_tokens.weight" not in whole


def test_logits_exist_only_at_label_positions():
    kind, model = make("llama-untied")
    engine = engine_of(model, kind)
    data = batch(kind)
    engine.check_batch(data)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    losses = engine.losses(data, probe_of(engine.view))
    handle.remove()
    assert shapes == [(3, 0, model.config.vocab_size)]
    assert losses.nll.numel() == int((data["labels"][:, 1:] != -100).sum())


def test_a_soft_cap_above_ordinary_logits_is_noticed():
    kind, model = make("gemma2")
    engine = engine_of(model, kind)
    data = batch(kind)
    losses = engine.losses(data)  # the first batch is the self-check
    assert engine.own_head
    assert torch.allclose(mean(losses).float(), own_loss(model, data), atol=1e-6)
    with torch.no_grad():
        model.lm_head.weight.mul_(500.0)  # now the cap bends the logits
    assert torch.allclose(mean(engine.losses(data)).float(), own_loss(model, data), atol=1e-5)


def test_readers_of_hard_cases():
    kind, model = make("mixtral")
    engine = engine_of(model, kind)
    engine.check_batch(batch(kind))
    experts = [r for r in engine.readers if r.name.endswith("experts")]
    assert experts and {a for r in experts for _, _, a in r.tensors} == {"gate_up_proj", "down_proj"}


def test_vit_reads_its_class_token_in_a_parent():
    import transformers as tf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
        model = tf.ViTForImageClassification(config).eval()
    data = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    engine = engine_of(model, "classification")
    engine.check_batch(data)
    probe = probe_of(engine.view)
    other = engine_of(displaced_copy(model, probe), "classification")
    other.check_batch(data)
    for _ in range(2):  # the second time the scratch buffers have their final size
        assert torch.equal(engine.losses(data, probe).nll, other.losses(data).nll)


class _ReadsElsewhere(nn.Module):
    """A head whose weight the root reads directly, and a position table that its owner hands out as it is."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 40).view(5, 8))

        def forward(self):
            return self.weight

    def __init__(self):
        super().__init__()
        self.table = self.Table()
        self.first = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view(p.shape))

    def forward(self, input_ids, **_):
        x = self.first(torch.ones(input_ids.shape[0], 8)) + self.table().sum(0)
        logits = F.linear(x, self.head.weight)
        return type("Out", (), {"logits": logits})()


def test_self_check_moves_scratch_to_the_module_that_reads():
    with torch.random.fork_rng():
        model = _ReadsElsewhere()
    data = {"input_ids": torch.zeros(2, 1, dtype=torch.long), "labels": torch.tensor([0, 1])}
    engine = engine_of(model, "classification")
    engine.check_batch(data)
    where = {e.name: r.name for r in engine.readers for e, _, _ in r.tensors}
    assert where == {"table.weight": "", "head.weight": "", "first.weight": "first", "first.bias": "first"}
    probe = probe_of(engine.view)
    other = engine_of(displaced_copy(model, probe), "classification")
    other.check_batch(data)
    assert torch.equal(engine.losses(data, probe).nll, other.losses(data).nll)


def test_a_read_outside_every_module_is_served_for_the_whole_evaluation():
    with torch.random.fork_rng():
        model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    engine = engine_of(model, "classification")
    engine.check(lambda: model.weight.sum())
    probe = probe_of(engine.view)
    got = engine.call(lambda: model.weight.sum(), probe)
    assert torch.equal(got, displaced_copy(model, probe).weight.detach().sum())
    assert torch.equal(model.weight.detach(), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


@pytest.mark.parametrize("n,vocab,width,block", [(1, 7, 3, 4), (5, 97, 24, 100), (13, 33, 5, 5), (4, 8, 8, 1 << 22)])
def test_blocked_head_equals_the_full_softmax(monkeypatch, n, vocab, width, block):
    from smidgen import loss

    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(loss, "BLOCK_POSITIONS", 3)
    generator = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, width, generator=generator), torch.randn(vocab, width, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    tokens = torch.randint(0, vocab, (n,), generator=generator)
    want = F.cross_entropy(F.linear(hidden, weight, bias), tokens, reduction="none")
    assert torch.allclose(head_nll(hidden, tokens, loss.PlainHead(weight, bias)), want, atol=1e-5)


def test_differentiable_loss_has_the_models_own_gradient(monkeypatch):
    from smidgen import loss

    monkeypatch.setattr(loss, "KEPT_LOGITS", 200)
    monkeypatch.setattr(loss, "BLOCK_POSITIONS", 7)
    for family in ("llama-tied", "t5-tied", "gemma2", "bert-masked"):
        kind, model = make(family)
        data = batch(kind, labels="all")
        engine = engine_of(model, kind)
        engine.check_batch(data)
        model(**data).loss.backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        engine.differentiable(data).nll.mean().backward()
        for name, parameter in model.named_parameters():
            if name in want:
                assert torch.allclose(parameter.grad, want[name], atol=1e-5, rtol=1e-4), (family, name)


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_of_logits_have_the_gradient_of_the_full_softmax_and_save_no_logits(monkeypatch, dtype, near, frozen):
    from smidgen import loss

    monkeypatch.setattr(loss, "KEPT_LOGITS", 40)
    monkeypatch.setattr(loss, "BLOCK_POSITIONS", 4)
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(size, generator=generator).to(dtype) for size in ((9, 6), (23, 6), (23,))]
    hidden, weight, bias = (t.requires_grad_(i == 0 or not frozen) for i, t in enumerate(made))
    tokens, g = torch.randint(0, 23, (9,), generator=generator), torch.randn(9, generator=generator)
    wanted_of = [t for t in made if t.requires_grad]
    with torch.enable_grad():
        want = F.cross_entropy(F.linear(hidden, weight, bias).float(), tokens, reduction="none")
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            found = loss.head_nll_differentiable(hidden, tokens, loss.PlainHead(weight, bias))
    assert max(kept) == (hidden if frozen else weight).numel() and torch.allclose(found, want, atol=near)
    pairs = zip(torch.autograd.grad(found, wanted_of, g), torch.autograd.grad(want, wanted_of, g), strict=True)
    assert all(a.dtype == dtype and torch.allclose(a, b, atol=near, rtol=near) for a, b in pairs)


def test_choices_restrict_the_softmax():
    kind, model = make("opt-tied")
    data = batch(kind)
    data["labels"][:, -2] = -100
    data["choices"] = torch.tensor([5, 11, 20])
    data["labels"][:, -1] = torch.tensor([11, 5, 20])
    engine = engine_of(model, kind)
    engine.check_batch(data)
    with torch.no_grad():
        logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, -2, [5, 11, 20]]
    want = F.cross_entropy(logits, torch.tensor([1, 0, 2]), reduction="none")
    assert torch.allclose(engine.losses(data).nll, want, atol=1e-5)
    assert torch.allclose(engine.choice_scores(data), logits, atol=1e-5)
    probe = probe_of(engine.view)
    other = engine_of(displaced_copy(model, probe), kind)
    other.check_batch(data)
    assert torch.equal(engine.losses(data, probe).nll, other.losses(data).nll)
