"""Pre-train a masked language model of 2 to 4 million weights on text, for the prompt route of the derivative-free study.

    python scripts/pretrain_masked.py --text ../shared/data --to runs/masked --minutes 30

Text: every column of strings of the `train.jsonl` files below --text, and `*.txt`; evaluation rows are not read.
RoBERTa's architecture, byte-level BPE made of the same text, its own label words counted in so that each is one token; 15 % of
tokens are predicted, 80 % of them masked, 10 % replaced, 10 % kept. The folder loads with `--model FOLDER`; it is not shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = [
    "terrible", "great", "bad", "negative", "positive", "World", "Sports", "Business", "Tech", "Yes", "Maybe", "No",
    "Company", "Education", "Artist", "Athlete", "Office", "Transportation", "Building", "Natural", "Village",
    "Animal", "Plant", "Album", "Film", "Written",
]  # fmt: skip
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's numbers


def texts(folder: Path) -> Iterator[str]:
    """Training texts, one record at a time."""
    for path in sorted(folder.rglob("train.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            strings = [v for v in json.loads(line).values() if isinstance(v, str) and len(v) > 20]
            if strings:
                yield " ".join(strings)
    for path in sorted(folder.rglob("*.txt")):
        yield from (part for part in path.read_text(encoding="utf-8").split("\n\n") if len(part) > 20)


def make_tokenizer(corpus: list[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE whose label words, after a space, are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    counted = "".join(f" {word}" for word in WORDS)
    tokenizer.train_from_iterator([*corpus, *[counted] * max(1000, len(corpus) // 10)], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)
    split = [word for word in WORDS if len(made.encode(f" {word}", add_special_tokens=False)) != 1]
    if split:
        raise SystemExit(f"label words of several tokens: {', '.join(split)}: raise --vocabulary")
    return made


def masked(
    ids: torch.Tensor, tokenizer: transformers.PreTrainedTokenizerFast, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels) of a batch of token ids."""
    chance = torch.rand(ids.shape, generator=generator)
    chosen = (chance < 0.15) & (ids >= len(SPECIAL))
    labels = ids.masked_fill(~chosen, -100)
    random = torch.randint(len(SPECIAL), len(tokenizer), ids.shape, generator=generator)
    inputs = torch.where(chosen & (chance < 0.12), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (chance >= 0.12) & (chance < 0.135), random, inputs), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=None, help="texts to read at most, for a trial")
    options = parser.parse_args()
    corpus = list(texts(options.text))[: options.rows]
    tokenizer = make_tokenizer(corpus, options.vocabulary)
    stream = torch.tensor([i for ids in tokenizer(corpus)["input_ids"] for i in ids])
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=4,
        intermediate_size=4 * options.hidden, max_position_embeddings=256 + 2, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(config)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{len(corpus)} texts, {len(stream)} tokens, {weights:,} weights", flush=True)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    begun, step, losses = time.monotonic(), 0, []
    while (passed := (time.monotonic() - begun) / (60 * options.minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * (1.0 - passed))
        starts = torch.randint(0, len(stream) - options.length, (options.batch,), generator=generator)
        ids, labels = masked(stream[starts[:, None] + torch.arange(options.length)], tokenizer, generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 200 == 0:
            print(f"step {step}  loss {sum(losses[-200:]) / 200:.3f}  {passed:.0%}", flush=True)
    model.eval().save_pretrained(options.to)
    tokenizer.save_pretrained(options.to)
    last = sum(losses[-200:]) / max(1, len(losses[-200:]))
    about = {"weights": weights, "tokens": len(stream), "steps": step, "loss": last, "perplexity": math.exp(last)}
    (options.to / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
