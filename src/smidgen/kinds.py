"""Kinds: what a model predicts, told from its architecture, and transformers' Auto class for each.

causal: the next token. masked: a token from both sides. classification: one of some classes. seq2seq: a text from a
text. image: the class of a picture. `transformers` is imported on use.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from smidgen.config import ConfigError

__all__ = ["Kind", "classifies", "detect_kind", "head_of", "seen_as"]

Kind = Literal["causal", "masked", "classification", "seq2seq", "image"]


class _Head(NamedTuple):
    """Transformers' Auto class of a kind, its table of the architectures that have one, and the head in words."""

    auto: str
    table: str
    words: str


_HEADS: dict[str, _Head] = {
    "causal": _Head("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "causal language-model head"),
    "masked": _Head("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", "masked language-model head"),
    "classification": _Head(
        "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "sequence-classification head"
    ),
    "seq2seq": _Head("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "sequence-to-sequence head"),
    "image": _Head("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "image-classification head"),
}


def classifies(kind: str) -> bool:
    """Whether a model of this kind gives logits of classes, one row each."""
    return kind in ("classification", "image")


def seen_as(kind: Kind) -> Kind:
    """The kind as which a loaded model is evaluated: an image classifier is a classifier whose rows are pictures."""
    return "classification" if kind == "image" else kind


def detect_kind(config: Any, labelled: bool) -> Kind:
    """What a model predicts, from its architecture; labelled: whether the data have classes.

    An encoder without a head becomes a classifier of labelled rows. Raises ConfigError where it cannot be told.
    """
    from transformers.models.auto import modeling_auto

    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    name = (config.architectures or [""])[0]
    pretrained = name.removesuffix("ForPreTraining") + "ForMaskedLM"  # BERT's first checkpoints carry both of its heads
    images = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    kind: Kind
    if name.endswith("ForImageClassification") or (config.model_type in images and config.model_type not in causal):
        kind = "image"
    elif name.endswith("ForSequenceClassification"):
        kind = "classification"
    elif config.is_encoder_decoder:
        kind = "seq2seq"
    elif name.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "causal"
    elif name.endswith("ForMaskedLM") or (pretrained in masked.values() and config.model_type != "electra"):
        kind = "masked"
    elif config.model_type in causal and config.model_type not in masked:
        kind = "causal"
    else:
        kind = "classification"
    if classifies(kind) and not labelled:
        raise ConfigError(
            f"{name or config.model_type} predicts classes, and the rows have no labels: give a labelled task or data with "
            "columns text and label (of pictures: a folder of images by class), or a causal or seq2seq model"
        )
    return kind


def head_of(name: str, config: Any, kind: str, *, trust_remote_code: bool = False) -> Any:
    """The Auto class that loads the model `name` as `kind`. Raises ConfigError where its architecture has no such head.

    Code that comes with the model counts if it may run.
    """
    import transformers

    if kind not in _HEADS:
        raise ConfigError(f"unknown kind '{kind}': auto, {', '.join(_HEADS)}")
    own = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    known = [key for key, head in _HEADS.items() if head.auto in own or type(config) in getattr(transformers, head.table)]
    if kind not in known:
        named = " or ".join(filter(None, (", ".join(known[:-1]), *known[-1:])))
        way_out = f"it can be {named}" if known else "it is no language model"
        raise ConfigError(f"model '{name}' ({config.model_type}) has no {_HEADS[kind].words}: {way_out}")
    return getattr(transformers, _HEADS[kind].auto)
