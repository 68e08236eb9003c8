"""The shipped default: a tiny causal language model and two small labelled sets (see README.md in this folder)."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = ("reviews", "topics")


def model_folder() -> Path:
    """Folder of the pre-trained model and its tokenizer, in Hugging Face's layout."""
    return HERE / "model"


def data_folder(name: str) -> Path:
    """Folder of a labelled set in DATA: train, validation and test as JSON Lines of {"text", "label"}."""
    if name not in DATA:
        raise ValueError(f"no embedded data set {name!r}: choose one of {', '.join(DATA)}")
    return HERE / name
