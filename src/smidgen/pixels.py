"""Pixels: pictures as a vision model's processor makes them, row by row when they are asked for, and in batches.

Pictures are resized, scaled and normalised by transformers' processor of the model, with PIL and numpy: torchvision is not
needed. Does not do: augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.config import ConfigError, RunConfig
from smidgen.pictures import Picture
from smidgen.tasks import Example

__all__ = ["PixelCollator", "Pixels", "check_rows", "load_processor", "name_classes"]


def load_processor(location: str, **origin: Any) -> Any:
    """The image processor that comes with a model. Raises what transformers does where it has none."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(location, backend="pil", **origin)


def check_rows(config: RunConfig, name: str, pictures: bool, kind: str) -> None:
    """Raise ConfigError where a model of some kind cannot read the rows of a source, pictures or text, or where an option of
    text is set although they are pictures."""
    if pictures != (kind == "image"):
        has, takes = ("pictures", "text") if pictures else ("text", "pictures")
        raise ConfigError(
            f"the rows of '{name}' are {has}, and '{config.model}' ({kind}) reads {takes}: give "
            + ("a model with an image-classification head (a ViT)" if pictures else "a folder of images by class")
        )
    if not pictures:
        return
    for key in ("tokenizer", "max_length"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key} = {getattr(config, key)} is for text, and the rows are pictures: leave it out")


def name_classes(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """Write the names of the classes into a model's configuration, for all who load it; returns what a result says of them."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return {"class_names": list(names)}


class Pixels:
    """Examples with pictures, list-like: [i] is {"pixel_values": [C, H, W] float32 array, "labels": class}.

    The same attributes as `smidgen.encode.Encoded`. A picture is read and processed each time it is asked for.
    """

    kind = "image"
    choices = None
    max_length = 0  # rows have no length

    def __init__(self, examples: Sequence[Example], processor: Any):
        self.processor = processor
        mean = processor.image_mean
        self.channels = len(mean) if isinstance(mean, list | tuple) else 3
        self.pictures = [Picture.of(example.image, example.place) for example in examples]
        self.golds = [example.gold or 0 for example in examples]
        self.index = list(range(len(self.pictures)))
        self.lengths = [1] * len(self.pictures)
        self.notices: list[str] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        picture = self.pictures[position].open(self.channels)
        values = self.processor(images=picture, return_tensors="np")["pixel_values"][0]
        return {"pixel_values": values, "labels": self.golds[position]}


@dataclass(frozen=True)
class PixelCollator:
    """Rows -> pixel_values [B, C, H, W] and labels [B]. criterion: how classes are compared, see `loss.criterion_loss`."""

    criterion: str | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import numpy as np
        import torch

        batch: dict[str, Any] = {
            "pixel_values": torch.from_numpy(np.stack([row["pixel_values"] for row in rows])),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
        return batch if self.criterion is None else {**batch, "criterion": self.criterion}
