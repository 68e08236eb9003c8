"""Pictures: images of a data source before a model's processor sees them, and the folders and arrays that hold them.

A folder of images by class has a subfolder for each class; an .npz file has arrays `image` (n, height, width[, 3]) of uint8
and `label` (n,). A picture is opened when it is needed. `numpy` and `PIL` are imported on use.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.config import DataError

__all__ = ["SUFFIXES", "Picture", "by_class", "from_arrays", "has_classes", "is_picture"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """One image: a file, an array or a PIL image. `name` is what hashes of rows see: the same on every machine."""

    source: Any
    name: str
    place: str

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, value: Any, place: str) -> Picture:
        """The picture in a row: one already, a PIL image, an array, encoded bytes, a path, or `datasets`' {bytes, path}.

        Raises DataError for anything else.
        """
        if isinstance(value, Picture):
            return value
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str | Path):
            return cls(Path(value), str(value), place)
        raw = value if isinstance(value, bytes) else getattr(value, "tobytes", lambda: None)()
        if raw is None:
            raise DataError(f"{place}: 'image' is {str(value)[:40]!r}: a picture's file name, or a column of images is needed")
        return cls(value, hashlib.sha256(raw).hexdigest()[:16], place)

    def open(self, channels: int) -> Any:
        """As a PIL image of 1 (grey) or 3 channels. Raises DataError where it cannot be read."""
        import PIL.Image

        try:
            if isinstance(self.source, PIL.Image.Image):
                found = self.source
            elif isinstance(self.source, Path | bytes):
                found = PIL.Image.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)
            else:
                found = PIL.Image.fromarray(self.source)
            return found.convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, TypeError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise DataError(f"{self.place}: no image that can be read ({error}): replace or remove it") from None


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of an image."""
    return path.suffix.lower() in SUFFIXES


def _classes(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def has_classes(folder: Path) -> bool:
    """Whether a folder has subfolders with images in them."""
    return any(is_picture(file) for part in _classes(folder) for file in part.iterdir())


def by_class(folder: Path) -> Iterator[tuple[Picture, str]]:
    """(picture, class) of a folder of images by class, in the order of their names."""
    for part in _classes(folder):
        for file in sorted(filter(is_picture, part.iterdir())):
            yield Picture(file, f"{part.name}/{file.name}", str(file)), part.name


def from_arrays(path: Path) -> Iterator[tuple[Picture, int]]:
    """(picture, class) of an .npz file, without running code from it. Raises DataError for one that is not as stated."""
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("image", "label") if name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: no .npz file that can be read ({error}): save it with numpy.savez(image=..., label=...)"
        ) from None
    if len(arrays) < 2:
        raise DataError(f"{path}: has no arrays 'image' and 'label': save them with numpy.savez(image=..., label=...)")
    images, labels = arrays["image"], arrays["label"]
    right = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3))
    if not right:
        raise DataError(
            f"{path}: 'image' is {images.dtype} of shape {images.shape}: uint8 of (n, height, width) or (n, height, width, 3)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: 'label' is {labels.dtype} of shape {labels.shape}: {len(images)} whole numbers are needed")
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield Picture.of(image, f"{path}: image {number}"), label
