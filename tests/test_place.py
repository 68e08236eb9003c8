"""Virtual tokens inside a row, and the first few of them, against rows that really hold them there."""

from __future__ import annotations

import pytest
import torch

from families import batch, make
from smidgen.adapt import prompt
from smidgen.config import ConfigError


def by_hand(model, matrix, rows, position, used):
    """Logits of each row's real tokens with virtual tokens put between them, one row at a time and without padding."""
    found = []
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        n = min(position, len(ids)) if position >= 0 else max(0, len(ids) + position)
        e = model.get_input_embeddings()(ids)
        embeds = torch.cat([e[:n], matrix[:used].to(e.dtype), e[n:]])[None]
        out = model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long)).logits[0]
        found.append(torch.cat([out[:n], out[n + used :]]))
    return found


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "gpt2", "qwen3"])
@pytest.mark.parametrize(("position", "use"), [(3, None), (-2, 2), (0, 1), (40, None), (2, 0)])
def test_tokens_inside_a_row_are_those_of_a_row_that_holds_them(family, position, use):
    kind, model = make(family)
    plain = make(family)[1]
    adapted = prompt.build(model, prompt.Config(tokens=4, position=position, use=use), seed=3)
    matrix = next(iter(adapted.view)).storage
    matrix.mul_(5.0)
    rows = batch(kind, seed=10)
    inputs = {k: rows[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = adapted.model(**inputs).logits[:, -rows["input_ids"].shape[1] :]
        expected = by_hand(plain, matrix, rows, position, 4 if use is None else use)
    for mine, mask, theirs in zip(logits, rows["attention_mask"], expected, strict=True):
        assert torch.allclose(mine[mask.bool()], theirs, atol=2e-5)


def test_nested_counts_follow_the_step_and_rest_in_evaluations():
    class Clock:
        t = 0

    scheme = prompt.build(make("opt-tied")[1], prompt.Config(tokens=5, nested=True), seed=1)
    twin = prompt.build(make("opt-tied")[1], prompt.Config(tokens=5, nested=True), seed=1)
    assert scheme.count() == 5
    clock, counts = Clock(), []
    scheme.begin(clock)
    twin.begin(clock)
    for t in range(60):
        clock.t = t
        counts.append(scheme.count())
        assert twin.count() == counts[-1]
        with scheme.resting():
            assert scheme.count() == 5
    assert set(counts) == {1, 2, 3, 4, 5}


def test_what_is_refused():
    with pytest.raises(ConfigError, match="position, nested and use are for causal models, and RobertaForMaskedLM is none"):
        prompt.build(make("roberta-masked")[1], prompt.Config(position=1))
    with pytest.raises(ConfigError, match="GPTNeoForCausalLM masks attention by the order in memory"):
        prompt.build(make("gpt-neo")[1], prompt.Config(position=1))
    with pytest.raises(ConfigError, match="use = 6, but there are 5 virtual tokens"):
        prompt.build(make("opt-tied")[1], prompt.Config(tokens=5, use=6))
