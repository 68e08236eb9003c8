"""Quantising: how transformers is asked to hold a model's linear layers in 4 or 8 bits while it loads them (bitsandbytes)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from smidgen.config import ConfigError

__all__ = ["BYTES", "HEADS", "bitsandbytes_request", "require_bitsandbytes"]

# Bytes a weight: nf4's code of 4 bits, a scale of 8 bits for 64 weights, one of 32 bits for 256 scales. int8: without the
# scales of rows.
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}

# Modules of a classifier that a checkpoint of another kind lacks: drawn from the seed, they have no codes to hold.
HEADS = ["classifier", "pre_classifier", "pooler", "score"]


def require_bitsandbytes(quantise: str) -> None:
    """Raise ConfigError where the library that quantises is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantise = {quantise} needs bitsandbytes, which is not installed: pip install 'smidgen[eight-bit]'")


def bitsandbytes_request(quantise: str, compute: torch.dtype, left: list[str] | None) -> Any:
    """transformers' request for weights in 4 or 8 bits, multiplied in the dtype `compute`; left: modules that stay as they
    are, None: the output head."""
    from transformers import BitsAndBytesConfig

    require_bitsandbytes(quantise)
    if quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=left,
    )
