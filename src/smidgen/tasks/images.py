"""Images: classify pictures, from a folder of images by class, an .npz file, or rows with columns image and label.

A folder of images by class is CLASS/*.png, or train/CLASS/*.png beside validation/ and test/; rows (JSON Lines, CSV, Parquet,
a hub id) name an image's file relative to their own, or hold it. An .npz file has the arrays `image` and `label`. Classes are
inferred from the training rows, sorted, and then fixed. For models with an image-classification head (ViT and its kin).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from smidgen.config import ConfigError, DataError
from smidgen.tasks._example import Example, Row
from smidgen.tasks._labelled import Form, LabelledTask, own

status = "experimental"


class Config(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid")

    words: tuple[str, ...] | None = Field(None, description="names of the classes; name i stands for integer label i")
    label: str = Field("label", description="column of the class")
    image: str = Field("image", description="column of the image")
    source: str | None = Field(None, description="file, folder or hub id; usually given as `data`")


@dataclass
class ImageTask(LabelledTask):
    """Classes of pictures; nothing is prompted."""

    column: str = "image"
    pictures: bool = True

    def _example(self, row: Row, form: Form, options: tuple[str, ...]) -> Example:
        if row.get(self.column) is None:
            raise DataError(f"{row.place}: no column '{self.column}' (found: {', '.join(row)}): name it with task_args.image")
        gold = self._class(row)
        return Example("", options[gold], options=options, gold=gold, image=row[self.column], place=row.place)


def build(config: Config) -> ImageTask:
    if config.source is None:
        raise ConfigError("the task 'images' has no rows of its own: give --data FOLDER of images by class")
    nothing = own("{" + config.image + "}{answer}")
    return ImageTask("images", config.source, nothing, None, config.words, (config.label,), column=config.image)
