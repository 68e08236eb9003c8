"""Tuning schemes: what each tunes, where it starts, and that the engine computes what stock PEFT computes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from families import FAMILIES, batch, make, own_loss
from smidgen import adapt
from smidgen.collate import Collator
from smidgen.config import ConfigError
from smidgen.directions import Dense, displace
from smidgen.probing import Engine

VIRTUAL = ["prefix", "prompt"]
CAUSAL = [f for f, (kind, _) in FAMILIES.items() if kind == "causal"]
REFUSED = {("prompt", "gpt2-classification")}
REACHED = [(s, f) for s in VIRTUAL for f in FAMILIES if (s, f) not in REFUSED]


def adapted(scheme: str, family: str, dtype=torch.float32, fresh=(), **options):
    kind, model = make(family, dtype)
    module = adapt.get(scheme)
    return kind, model, module.build(model, module.Config(**options), seed=7, fresh=fresh)


def engine_of(kind, found):
    return Engine(found.model, found.view, kind)


def mean(losses):
    return losses.nll.double().mean()


def moved(found, scale=0.3):
    """Tuned tensors away from where they start."""
    generator = torch.Generator().manual_seed(2)
    for entry in found.view:
        entry.storage.add_(scale * torch.randn(entry.tensor.shape, generator=generator).to(entry.tensor.dtype))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("scheme", VIRTUAL)
def test_virtual_tokens_start_as_real_ones(scheme, family):
    """A row under the fresh scheme is the row behind m real tokens in the plain model."""
    from smidgen.adapt._virtual import random_tokens

    _, plain = make(family)
    _, _, found = adapted(scheme, family)
    m = adapt.get(scheme).Config().positions
    assert m == {"prefix": 5, "prompt": 10}[scheme]
    ids = torch.tensor([[4, 9, 16, 25, 36]])
    first = random_tokens(7, m, plain.get_input_embeddings().weight.shape[0])[None]
    with torch.no_grad():
        got = found.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -5:]
        want = plain(input_ids=torch.cat([first, ids], 1)).logits[:, m:]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("scheme,family", REACHED)
def test_the_engines_loss_is_that_of_pefts_own_forward(scheme, family):
    kind, _, found = adapted(scheme, family)
    moved(found)
    for labels in ("some", "all"):
        data = batch(kind, labels=labels)
        if kind == "causal":  # stock PEFT leaves positions out under prompt tuning: rows without padding are the same
            data["attention_mask"] = torch.ones_like(data["attention_mask"])
            data["labels"][:, 0] = -100  # and predicts the first token from the last virtual one
        got = engine_of(kind, found).losses(data)
        if kind == "masked":
            with torch.no_grad():
                logits = found.model(**{k: v for k, v in data.items() if k != "labels"}).logits[:, -9:]
            want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten())
        else:
            want = own_loss(found.model, data)
        assert torch.allclose(mean(got).float(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme,family", [r for r in REACHED if r[1] != "mistral"])  # its window of 8 counts padding
def test_padded_rows_give_what_they_give_alone(scheme, family):
    kind, _, found = adapted(scheme, family)
    moved(found)
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (9, 4, 6):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": len(rows) if kind == "classification" else ids[:4]})
        if kind in ("causal", "masked"):
            rows[-1]["labels"] = [-100] * (length - 2) + ids[-2:]
    collator = Collator(0, kind, position_ids=True)
    engine = engine_of(kind, found)
    together = engine.losses(collator(rows)).nll
    alone = torch.cat([engine.losses(collator([row])).nll for row in rows])
    assert torch.allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize("scheme,family", REACHED)
def test_probes_displace_the_virtual_tokens_bit_for_bit(scheme, family, caplog):
    kind, _, found = adapted(scheme, family)
    engine, data = engine_of(kind, found), batch(kind)
    engine.check_batch(data)
    assert not [r for r in caplog.records if "whole evaluation" in r.getMessage()]
    probe = ((Dense(7, 3, 1, found.view.ids, "gaussian"), 1e-1),)
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    got = engine.losses(data, probe).nll
    assert all(torch.equal(before[n], p) for n, p in found.model.named_parameters())
    assert not torch.equal(got, engine.losses(data).nll)
    for entry in found.view:
        displace(probe, entry.name, entry.storage.clone(), entry.storage)
    assert torch.equal(got, engine.losses(data).nll)


@pytest.mark.parametrize("family", ["bert-masked", "roberta-masked"])
def test_an_encoders_first_layer_attends_to_the_prefix_as_to_real_tokens(family, monkeypatch):
    """With one layer, keys and values do not depend on what follows: prefix and real tokens are the same."""
    from smidgen.adapt._virtual import random_tokens

    _, model = make(family)
    model.base_model.encoder.layer = model.base_model.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    plain = copy.deepcopy(model)
    scheme = adapt.get("prefix")
    found = scheme.build(model, scheme.Config(), seed=7)
    ids = torch.tensor([[4, 9, 16, 25, 36]])
    first = random_tokens(7, 5, 97)[None]
    with torch.no_grad():
        got = found.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        want = plain(input_ids=torch.cat([first, ids], 1)).logits[:, 5:]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("family,layers", [("t5-tied", 2), ("t5-untied", 3)])
def test_every_decoder_layer_of_t5_has_a_prefix_of_its_own(family, layers):
    import transformers as tf

    _, model = make(family)
    if layers == 3:
        config = copy.deepcopy(model.config)
        config.num_layers = config.num_decoder_layers = 3
        with torch.random.fork_rng():
            model = tf.T5ForConditionalGeneration(config).eval()
    scheme = adapt.get("prefix")
    found = scheme.build(model, scheme.Config(), seed=7)
    seen = []

    def look(_, __, given):
        cache = given["past_key_values"].self_attention_cache
        seen.append(cache.layers[len(seen)].keys.clone())

    for block in model.decoder.block:
        block.layer[0].SelfAttention.register_forward_pre_hook(look, with_kwargs=True)
    data = batch("seq2seq")
    engine_of("seq2seq", found)._forward(data)
    assert len(seen) == layers
    for i in range(layers):
        for j in range(i):
            assert not torch.equal(seen[i], seen[j])


@pytest.mark.parametrize("family", ["opt-tied", "llama-tied", "gpt2", "qwen3", "t5-tied"])
@pytest.mark.parametrize("scheme", VIRTUAL)
def test_generation_in_a_batch_equals_one_by_one_and_the_engines_own_choice(scheme, family):
    kind, _, found = adapted(scheme, family)
    moved(found)
    collator = Collator(0, kind)
    rows = [{"input_ids": [5, 17, 33, 20, 9]}, {"input_ids": [40, 8]}]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        together = found.model.generate(**collator(rows), **options)[:, -4:]
        alone = torch.cat([found.model.generate(**collator([row]), **options)[:, -4:] for row in rows])
    assert torch.equal(together, alone)
    if kind == "causal":  # without a cache, token by token, through the engine
        engine = engine_of(kind, found)
        ids = list(rows[1]["input_ids"])
        for _ in range(4):
            batch = collator([{"input_ids": [*ids, 0], "labels": [-100] * len(ids) + [0]}])
            ids.append(int(engine.choice_scores({**batch, "choices": torch.arange(97)}).argmax()))
        assert ids[2:] == alone[1].tolist()


@pytest.mark.parametrize("family", ["opt-tied", "llama-tied", "gpt2"])
@pytest.mark.parametrize("scheme", VIRTUAL)
def test_options_score_with_the_virtual_tokens_once(scheme, family):
    """A prompt that runs once with a cache would get them a second time with the options."""
    from smidgen.questions import Candidates
    from smidgen.scoring import OptionScorer, row_sums
    from test_scoring import EXAMPLES, small_tokenizer

    kind, _, found = adapted(scheme, family)
    collator = Collator(0, kind, position_ids=True)
    engine, candidates = engine_of(kind, found), Candidates(EXAMPLES, small_tokenizer(), kind, 50)
    together = OptionScorer(candidates, collator, 4)(engine).nll
    options = candidates.options
    alone = torch.cat([row_sums(engine, collator([options[k]])).nll for k in range(len(options))])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", VIRTUAL)
def test_virtual_tokens_stay_float32_over_16_bit_weights(scheme, dtype):
    kind, model, found = adapted(scheme, "llama-untied", dtype)
    assert {e.tensor.dtype for e in found.view} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(mean(engine_of(kind, found).losses(batch(kind))))


@pytest.mark.parametrize("scheme", VIRTUAL)
def test_the_start_is_addressed_by_the_seed(scheme):
    def start(seed, **options):
        module = adapt.get(scheme)
        return module.build(make("opt-tied")[1], module.Config(**options), seed=seed).view

    name = "prompt_encoder.default.embedding.weight"
    before = torch.random.get_rng_state()
    assert torch.equal(start(1)[name].storage, start(1)[name].storage)
    assert not torch.equal(start(1)[name].storage, start(2)[name].storage)
    drawn = start(1, init="random", tokens=40)[name].storage
    assert drawn.shape[0] == 40 and abs(float(drawn.mean())) < 5 * drawn.numel() ** -0.5
    assert abs(float(drawn.var()) - 1) < 5 * (2 / drawn.numel()) ** 0.5  # the variance of a sample variance is 2 / n
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("scheme", VIRTUAL)
@pytest.mark.parametrize("family", ["bert-classification", "roberta-classification"])
def test_a_classification_head_is_tuned_only_where_it_is_new(scheme, family, tmp_path):
    head = [n for n, _ in make(family)[1].named_parameters() if n.startswith("classifier")]
    _, _, old = adapted(scheme, family)
    _, _, new = adapted(scheme, family, fresh=head)
    assert len(old.view) == 1 and len(new.view) == 1 + len(head)
    moved(new)
    new.save(tmp_path)
    _, _, again = adapted(scheme, family, fresh=head)
    again.load(tmp_path)
    assert all(torch.equal(e.storage, again.view[e.name].storage) for e in new.view)


def test_what_cannot_carry_virtual_tokens_is_refused():
    import transformers as tf

    with pytest.raises(ConfigError, match=r"GPT2ForSequenceClassification takes padding for text.*kind causal"):
        adapted("prompt", "gpt2-classification")
    with torch.random.fork_rng():
        encoder = tf.DistilBertForMaskedLM(tf.DistilBertConfig(vocab_size=97, dim=24, hidden_dim=40, n_layers=2, n_heads=4))
        recurrent = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, state_size=4))
    for model in (encoder, recurrent):
        with pytest.raises(ConfigError, match=r"keys and values.*use scheme prompt or lora"):
            adapt.get("prefix").build(model.eval(), adapt.get("prefix").Config())


@pytest.mark.parametrize("scheme", ["lora", *VIRTUAL])
def test_a_scheme_is_built_without_a_word_of_pefts_about_its_own_code(scheme):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(scheme, "llama-untied")


def test_prefix_refuses_activation_checkpointing():
    _, _, found = adapted("prefix", "llama-tied")
    with pytest.raises(ConfigError, match=r"activation checkpointing.*use scheme prompt or lora"):
        found.model.gradient_checkpointing_enable()


@pytest.mark.parametrize("scheme", ["prompt", "bitfit", "head", "lora"])
def test_activation_checkpointing_gives_the_same_gradients(scheme):
    found = []
    for checkpointed in (False, True):
        kind, _, made = adapted(scheme, "opt-tied")
        if checkpointed:
            made.model.gradient_checkpointing_enable()
        engine = engine_of(kind, made)
        engine.check_batch(batch(kind))
        for module in made.model.modules():  # layers are checkpointed in training mode only, without dropout here
            module.training = "Dropout" not in type(module).__name__
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        engine.differentiable(batch(kind)).nll.mean().backward()
        found.append({e.name: e.tensor.grad for e in made.view if e.tensor.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


# -- a model's own tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_tunes_biases_and_norms(family):
    _, model = make(family)
    names = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    scheme = adapt.get("bitfit")
    if not names:
        with pytest.raises(ConfigError, match=r"no biases to tune: tune its .* scheme_args.norms=true"):
            scheme.build(model, scheme.Config())
    else:
        assert set(scheme.build(model, scheme.Config()).view.entries) == names
    both = set(scheme.build(model, scheme.Config(norms=True)).view.entries)
    norms = both - names
    assert names <= both and norms
    assert all("norm" in n.lower() or "ln_" in n for n in norms) and all(n.endswith("weight") for n in norms)
    assert all(model.get_parameter(n).ndim == 1 for n in both)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_tunes_what_follows_the_trunk_and_leaves_the_input_alone(family):
    kind, model = make(family)
    plain = copy.deepcopy(model)
    scheme = adapt.get("head")
    found = scheme.build(model, scheme.Config())
    heads = ("lm_head.", "classifier.", "score.", "cls.")
    assert all(name.startswith(heads) for name in found.view.entries)
    engine, data = engine_of(kind, found), batch(kind)
    engine.check_batch(data)
    assert torch.allclose(mean(engine.losses(data)).float(), own_loss(plain, data), atol=2e-6, rtol=1e-5)
    moved(found)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert torch.allclose(mean(engine.losses(data)).float(), own_loss(model, data), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["opt-tied", "llama-tied", "gpt2", "t5-tied", "bert-masked", "roberta-classification"])
@pytest.mark.parametrize("scheme", ["bitfit", "head"])
def test_chosen_tensors_come_back_from_their_file_and_from_the_whole_model(scheme, family, tmp_path):
    options = {"norms": True} if scheme == "bitfit" else {}
    kind, model, found = adapted(scheme, family, **options)
    moved(found)
    (tmp_path / "a").mkdir()
    found.save(tmp_path / "a")
    _, _, again = adapted(scheme, family, **options)
    again.load(tmp_path / "a")
    data = batch(kind)
    assert torch.equal(engine_of(kind, found).losses(data).nll, engine_of(kind, again).losses(data).nll)
    assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) < found.view.nbytes() + 8000
    found.merged().save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole").eval()
    assert torch.allclose(own_loss(whole, data), own_loss(model, data), atol=1e-6)


def test_a_file_of_chosen_tensors_is_refused_by_another_model_or_scheme(tmp_path):
    _, _, found = adapted("bitfit", "opt-tied")
    found.save(tmp_path)
    _, other = make("opt-tied", seed=1)
    scheme = adapt.get("bitfit")
    with pytest.raises(ConfigError, match="another base model"):
        scheme.build(other, scheme.Config()).load(tmp_path)
    with pytest.raises(ConfigError, match="does not fit this model"):
        adapted("head", "opt-tied")[2].load(tmp_path)
