"""Kinds: told from the architecture, and refused where the architecture has no such head."""

from __future__ import annotations

import pytest
import transformers as tf

from smidgen.config import ConfigError
from smidgen.kinds import detect_kind, head_of


@pytest.mark.parametrize(
    ("architecture", "config", "labelled", "kind"),
    [
        ("LlamaForCausalLM", tf.LlamaConfig, False, "causal"),
        ("GPT2LMHeadModel", tf.GPT2Config, True, "causal"),
        ("GPT2Model", tf.GPT2Config, False, "causal"),
        (None, tf.OPTConfig, False, "causal"),
        ("BertForMaskedLM", tf.BertConfig, True, "masked"),
        ("BertForPreTraining", tf.BertConfig, True, "masked"),
        ("ElectraForPreTraining", tf.ElectraConfig, True, "classification"),
        ("BertModel", tf.BertConfig, True, "classification"),
        ("RobertaForSequenceClassification", tf.RobertaConfig, True, "classification"),
        ("BartForSequenceClassification", tf.BartConfig, True, "classification"),
        ("BartForConditionalGeneration", tf.BartConfig, True, "seq2seq"),
        ("T5ForConditionalGeneration", tf.T5Config, False, "seq2seq"),
        ("ViTForImageClassification", tf.ViTConfig, True, "image"),
        ("ViTModel", tf.ViTConfig, True, "image"),
    ],
)
def test_kind_from_architecture(architecture, config, labelled, kind):
    assert detect_kind(config(architectures=[architecture] if architecture else None), labelled) == kind


def test_an_encoder_without_a_head_needs_labels():
    with pytest.raises(ConfigError, match="the rows have no labels"):
        detect_kind(tf.BertConfig(architectures=["BertModel"]), labelled=False)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (tf.LlamaConfig(), ("causal", "classification")),
        (tf.BertConfig(), ("causal", "masked", "classification")),
        (tf.T5Config(), ("classification", "seq2seq")),
        (tf.ViTConfig(), ("image",)),
        (tf.Wav2Vec2Config(), ()),
    ],
)
def test_heads_of_architectures(config, kinds):
    for kind in ("causal", "masked", "classification", "seq2seq", "image"):
        if kind in kinds:
            assert head_of("x", config, kind).__name__.startswith("AutoModelFor")
            continue
        with pytest.raises(ConfigError, match=rf"^model 'x' \({config.model_type}\) has no .* head: it ") as caught:
            head_of("x", config, kind)
        assert all(other in str(caught.value).rpartition(": ")[2] for other in kinds)
        assert bool(kinds) != str(caught.value).endswith(": it is no language model")


def test_code_of_the_model_brings_heads_if_it_may_run():
    config = tf.ViTConfig(auto_map={"AutoModelForCausalLM": "mine.Mine"})
    assert head_of("x", config, "causal", trust_remote_code=True) is tf.AutoModelForCausalLM
    with pytest.raises(ConfigError, match="it can be image"):
        head_of("x", config, "causal")
