"""Tiny random models of many families, made from configs, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, WIDTH = 97, 24

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}


def _opt(tied: bool) -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            tie_word_embeddings=tied,
        )
    )


def _llama(tied: bool) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, tie_word_embeddings=tied))


def _t5(tied: bool) -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    return tf.T5ForConditionalGeneration(config)


FAMILIES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "opt-tied": ("causal", lambda: _opt(True)),
    "opt-untied": ("causal", lambda: _opt(False)),
    "llama-tied": ("causal", lambda: _llama(True)),
    "llama-untied": ("causal", lambda: _llama(False)),
    "mistral": ("causal", lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA, sliding_window=8))),
    "qwen3": ("causal", lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA, head_dim=8, tie_word_embeddings=True))),
    "gpt2": (
        "causal",
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)),
    ),
    "gpt-neo": (
        "causal",
        lambda: tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                num_layers=2,
                num_heads=4,
                max_position_embeddings=64,
                attention_types=[[["global", "local"], 1]],
            )
        ),
    ),
    "gemma2": (  # soft-caps its logits after the head
        "causal",
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_LLAMA, head_dim=8, final_logit_softcapping=30.0)),
    ),
    "mixtral": (
        "causal",
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=2)),
    ),
    "roberta-masked": ("masked", lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT))),
    "roberta-classification": (
        "classification",
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_BERT, num_labels=3)),
    ),
    "bert-masked": ("masked", lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT))),
    "bert-classification": ("classification", lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT, num_labels=3))),
    "gpt2-classification": (
        "classification",
        lambda: tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, num_labels=3)
        ),
    ),
    "t5-tied": ("seq2seq", lambda: _t5(True)),
    "t5-untied": ("seq2seq", lambda: _t5(False)),
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[str, nn.Module]:
    """(kind, model in evaluation mode), initialised from `seed` without touching the global RNG."""
    kind, build = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():  # biases and norms away from their trivial values
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return kind, model.to(dtype).eval()


def batch(kind: str, rows: int = 3, length: int = 9, labels: str = "some", seed: int = 1) -> dict[str, Any]:
    """A ragged batch; `labels` is "some" (last two positions) or "all"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if kind == "causal":
        mask[0, :2], ids[0, :2] = 0, 0
    else:
        mask[0, -2:], ids[0, -2:] = 0, 0
    data: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "classification":
        data["labels"] = torch.arange(rows) % 3
        return data
    if kind == "seq2seq":
        data["labels"] = torch.randint(3, VOCAB, (rows, 4), generator=generator)
        data["labels"][1, -1] = -100
        return data
    target = ids.masked_fill(mask == 0, -100)
    if labels == "some":
        keep = torch.zeros_like(ids, dtype=torch.bool)
        keep[:, -2:] = True
        if kind == "masked":
            keep = torch.zeros_like(keep)
            keep[:, 3] = True
        target = target.masked_fill(~keep, -100)
    data["labels"] = target
    return data


def own_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The loss that the model itself computes over full logits."""
    with torch.no_grad():
        return model(**data).loss
