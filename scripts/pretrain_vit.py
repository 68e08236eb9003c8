"""Pre-train a small vision transformer on some classes of a set of pictures, for the transfer study of VeLoRA.

    python scripts/pretrain_vit.py --data ../shared/data/mnist --classes 0 1 2 3 4 --to runs/vit

The architecture is ViT's (Dosovitskiy et al., 2021, arXiv 2010.11929), small enough for a CPU. The folder holds the trunk
without its head, and the image processor: `smidgen train --model FOLDER --data PICTURES` draws a head for the classes it finds.
It is not shipped. Printed at the end: accuracy on the validation rows of these classes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from smidgen.pixels import PixelCollator, Pixels
from smidgen.rows import read_rows
from smidgen.tasks import Example


def examples(data: str, split: str, classes: list[int]) -> list[Example]:
    """The pictures of some classes."""
    rows = [row for row in read_rows(data, split) if row["label"] in classes]
    return [Example("", "", gold=classes.index(row["label"]), image=row["image"], place=row.place) for row in rows]


def batch(rows: Pixels, members: list[int]) -> dict[str, torch.Tensor]:
    return PixelCollator()([rows[i] for i in members])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = transformers.ViTConfig(
        image_size=28, patch_size=4, num_channels=1, hidden_size=args.width, intermediate_size=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=4, num_labels=len(args.classes),
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5])
    train, dev = (Pixels(examples(args.data, split, args.classes), processor) for split in ("train", "validation"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    began, order = time.perf_counter(), list[int]()
    for step in range(args.steps):
        if len(order) < args.batch:
            order = torch.randperm(len(train)).tolist()
        members, order = order[: args.batch], order[args.batch :]
        loss = model(**batch(train, members)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, len(dev), 256):
            seen = batch(dev, list(range(first, min(first + 256, len(dev)))))
            right += int((model(pixel_values=seen["pixel_values"]).logits.argmax(1) == seen["labels"]).sum())
    model.vit.save_pretrained(args.to)
    processor.save_pretrained(args.to)
    weights = sum(p.numel() for p in model.vit.parameters())
    print(json.dumps({"rows": len(train), "steps": args.steps, "weights": weights, "accuracy": round(right / len(dev), 4)}))


if __name__ == "__main__":
    main()
