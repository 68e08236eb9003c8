"""Pictures: folders by class, arrays and tables give the same rows; image classifiers are tuned as any other model."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import smidgen
from smidgen.config import ConfigError, DataError
from smidgen.config_file import load
from smidgen.data import open_corpus
from smidgen.export import export
from smidgen.inference import evaluate_folder
from smidgen.pictures import Picture
from smidgen.pixels import PixelCollator, Pixels
from smidgen.rows import read_rows
from smidgen.splits import split_rows
from smidgen.tasks import Example
from test_models import bert_masked

SIDE = 8


def arrays(count=24, classes=("cat", "dog"), channels=1):
    """Pictures whose class is seen: the second is bright."""
    made = np.random.default_rng(0)
    labels = np.arange(count) % len(classes)
    shape = (count, SIDE, SIDE) if channels == 1 else (count, SIDE, SIDE, 3)
    return (made.integers(0, 60, shape) + 150 * labels.reshape(-1, *[1] * (len(shape) - 1))).astype(np.uint8), labels


def by_class(folder, count=24, classes=("cat", "dog")):
    images, labels = arrays(count, classes)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        part = folder / classes[label]
        part.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(part / f"{number:03}.png")
    return folder


def vit(folder, channels=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tf.ViTConfig(
            image_size=SIDE, patch_size=4, num_channels=channels, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2,
        )  # fmt: skip
        tf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    scale = [0.5] * channels
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=scale, image_std=scale).save_pretrained(folder)
    return folder


def tune(model, folder, data, **options):
    values = {"model": str(model), "data": str(data), "output": str(folder), "train.max_steps": 4, "threads": 1}
    return smidgen.finetune(load(None, [], {**values, **options}), say=lambda line: None)


# ------------------------------------------------------------------------------------------------------------- rows


def test_folders_arrays_and_tables_hold_the_same_pictures(tmp_path):
    by_class(tmp_path / "folder")
    images, labels = arrays()
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    names = [f"{c}/{n:03}.png" for n in range(24) for c in [("cat", "dog")[n % 2]]]
    lines = [json.dumps({"image": f"folder/{name}", "label": name[:3]}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("image,label\n" + "".join(f"folder/{n},{n[:3]}\n" for n in names))
    found = {}
    for name in ("folder", "a.npz", "a.jsonl", "a.csv"):
        rows = read_rows(tmp_path / name)
        classes = [row["label"] if name == "a.npz" else ("cat", "dog").index(row["label"]) for row in rows]
        seen = {(row["image"].open(1).tobytes(), label) for row, label in zip(rows, classes, strict=True)}
        found[name] = len(rows), seen
    assert all(value == found["folder"] for value in found.values()) and found["folder"][0] == 24


def test_splits_of_a_folder_and_what_is_held_out_without_them(tmp_path):
    by_class(tmp_path / "a" / "train")
    by_class(tmp_path / "a" / "val", 6)
    assert (len(read_rows(tmp_path / "a", "train")), len(read_rows(tmp_path / "a", "dev"))) == (24, 6)
    first, second = split_rows(read_rows(by_class(tmp_path / "b"))), split_rows(read_rows(by_class(tmp_path / "c" / "deep")))
    assert [str(row["image"]) for row in first[1]] == [str(row["image"]) for row in second[1]]  # whatever the folder's name
    assert len(first[1]) == 2


def test_classes_are_inferred_and_pictures_reach_the_model_as_its_processor_makes_them(tmp_path):
    corpus = open_corpus(load(None, [], {"data": str(by_class(tmp_path))}))
    assert corpus.words == ("cat", "dog") and corpus.pictures
    examples = corpus.examples("train", "image")
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    batch = PixelCollator()(Pixels(examples, processor)[::5])
    assert batch["pixel_values"].shape == (5, 3, 4, 4) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [example.gold for example in examples[::5]]
    dark, bright = (batch["pixel_values"][batch["labels"] == label].mean() for label in (0, 1))
    assert dark < -0.5 < 0 < bright


def test_a_picture_may_be_bytes_or_an_image(tmp_path):
    PIL.Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    held = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    for value in (held, PIL.Image.open(tmp_path / "a.png"), str(tmp_path / "a.png")):
        assert Picture.of(value, "row 1").open(3).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(DataError, match="row 1: 'image' is '7'"):
        Picture.of(7, "row 1")


def test_bad_sources_say_what_is_wrong(tmp_path):
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="or a folder of images for each class"):
        read_rows(tmp_path / "empty")
    for name, values, told in (
        ("a", {"image": np.zeros((2, 3, 3))}, "no arrays 'image' and 'label'"),
        ("b", {"image": np.zeros((2, 3, 3)), "label": np.zeros(2, int)}, r"float64 of shape \(2, 3, 3\): uint8"),
        ("c", {"image": np.zeros((2, 3, 3), np.uint8), "label": np.zeros(3, int)}, "2 whole numbers are needed"),
    ):
        np.savez(tmp_path / f"{name}.npz", **values)
        with pytest.raises(DataError, match=told):
            read_rows(tmp_path / f"{name}.npz")
    (tmp_path / "d.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"no \.npz file that can be read"):
        read_rows(tmp_path / "d.npz")
    folder = by_class(tmp_path / "e", 4)
    (folder / "cat" / "000.png").write_bytes(b"no image")
    broken = [Example("", "", image=row["image"], place=row.place) for row in read_rows(folder)]
    with pytest.raises(DataError, match=r"e/cat/000\.png: no image that can be read"):
        Pixels(broken, ViTImageProcessorPil(image_mean=[0.5] * 3))[0]


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.trainer
@pytest.mark.parametrize("scheme", ["full", "lora", "head", "ssf", "hydra"])
def test_velora_trains_a_vision_transformer_under_every_scheme_of_the_paper(tmp_path, scheme):
    options = {"scheme": scheme, "method": "velora_adamw", "activations": "velora", "activations_args.size": 4}
    found = tune(
        vit(tmp_path / "model"),
        tmp_path / "run",
        by_class(tmp_path / "data"),
        **options,
        **{"train.max_steps": 20, "train.learning_rate": 2e-3},
    )
    assert found["kind"] == "image" and found["classes"] == 2 and found["dev"]["loss"] < found["before"]["loss"]
    exported = export(tmp_path / "run", tmp_path / "plain", "merged")
    assert exported["max_difference"] < 1e-4
    saved = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert saved["id2label"] == {"0": "cat", "1": "dog"} and (tmp_path / "plain" / "preprocessor_config.json").exists()


@pytest.mark.trainer
@pytest.mark.parametrize("options", [{"method": "zo_sgd"}, {"method": "fzoo"}, {"method": "zo_sgd", "objective": "accuracy"}])
def test_forward_only_methods_tune_it_and_replay(tmp_path, options):
    model, data = vit(tmp_path / "model"), by_class(tmp_path / "data")
    found = tune(model, tmp_path / "run", data, **options)
    again = smidgen.replay(str(model), tmp_path / "run", tmp_path / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"] and found["backwards"] == 0
    measured = evaluate_folder(str(tmp_path / "run"), task=None, data=None, split="dev", batch_size=None)
    assert measured["loss"] == pytest.approx(found["dev"]["loss"], abs=1e-6)


@pytest.mark.trainer
def test_pictures_and_text_go_to_models_that_read_them(tmp_path):
    pictures = by_class(tmp_path / "pictures")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {i}", "label": i % 2}) + "\n" for i in range(8)))
    with pytest.raises(ConfigError, match=r"are pictures, and '.*' \(classification\) reads text: give a model with"):
        tune(bert_masked(tmp_path / "bert"), tmp_path / "run", pictures, kind="classification")
    with pytest.raises(ConfigError, match=r"are text, and '.*' \(image\) reads pictures: give a folder of images"):
        tune(vit(tmp_path / "vit"), tmp_path / "run", text)
    for options in ({"max_length": 8}, {"scheme": "readout"}, {"chat": "vicuna"}, {"packing": True}):
        with pytest.raises(ConfigError):
            tune(tmp_path / "vit", tmp_path / "run", pictures, **options)
    assert not (tmp_path / "run").exists()
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="its image processor cannot be read"):
        tune(tmp_path / "vit", tmp_path / "run", pictures)
