"""Pre-train the embedded causal language model: a Llama of 2 million parameters, from nothing, on one CPU core.

Text: TinyStories and tiny Shakespeare from a folder that the caller names, and the documents of ``make_data.py``.
Recipe: byte-level BPE of 2048 tokens; windows of 256 tokens cut from the shuffled, concatenated documents ``<s> text </s>``,
each window seen once; AdamW, linear warm-up, cosine decay to a tenth; forward and backward in bfloat16 autocast, weights
and state in float32; stored as float16, loaded as float32. Seeded; the same machine, versions and thread count give the same
weights. Cost: about 6 floating-point operations a weight and token for 2 million weights, some 0.6 GB of memory.
It does not search hyper-parameters: every constant below is chosen, not tuned, unless it says otherwise.

    python -m smidgen.embedded.pretrain --data DATA --to FOLDER [--tokens 13e6] [--threads 1]

DATA holds ``tinystories/{train,validation}.jsonl`` and ``tiny_shakespeare/train.jsonl``, rows {"text": ...}.
FOLDER gets the model; it is also written every SAVE_SECONDS, file by file through a temporary name.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smidgen.embedded.make_data import corpus

VOCAB, CONTEXT, BATCH = 2048, 256, 8
PAD = 0  # the first special token
LR, FINAL, WARMUP, DECAY, CLIP = 3e-3, 0.1, 200, 0.1, 1.0
STORY_EPOCHS, SHAKESPEARE_EPOCHS = 6, 1  # how often each real document is used
SEED, SAVE_SECONDS = 0, 300
# Words that prompts answer with: each becomes one token.
ANSWERS = "great terrible good bad positive negative yes no true false maybe world sports business science"
CHAT = (  # the prompt ends without a space, because the answer's first token carries it
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}Assistant:{% generation %}"
    "{{ ' ' + message.content + eos_token }}{% endgeneration %}{% else %}"
    "{{ message.role | capitalize }}: {{ message.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def real_documents(data: Path) -> list[str]:
    """Every story STORY_EPOCHS times, and Shakespeare in pieces of about 800 characters."""
    blocks = read_texts(data / "tiny_shakespeare" / "train.jsonl")[0].split("\n\n")
    pieces = [""]
    for block in blocks:
        pieces[-1] += block + "\n\n"
        if len(pieces[-1]) > 800:
            pieces.append("")
    return (
        read_texts(data / "tinystories" / "train.jsonl") * STORY_EPOCHS
        + [piece.strip() for piece in pieces if piece.strip()] * SHAKESPEARE_EPOCHS
    )


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> before every text; the answer words are repeated so that they merge into one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, f" {ANSWERS}" * 20000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


def training_windows(tokenizer: PreTrainedTokenizerFast, real: list[str], tokens: int) -> Tensor:
    """int64 [windows, CONTEXT]: real documents, filled up to `tokens` with generated ones, shuffled, cut."""
    rng = random.Random(SEED)
    rows = tokenizer(real)["input_ids"]
    count = sum(map(len, rows))
    generated: Iterator[str] = corpus(10**12)
    while count < tokens:
        fresh = tokenizer(list(islice(generated, 4096)))["input_ids"]
        rows += fresh
        count += sum(map(len, fresh)) + len(fresh)
    rng.shuffle(rows)
    flat = torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)], dtype=torch.int16)
    return flat[: min(tokens, len(flat)) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model. Normal(0, 0.02) as transformers draws it, from a generator of our own."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from LR to FINAL * LR."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LR * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def next_token_loss(model: LlamaForCausalLM, window: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of tokens 1.. of `window` int64 [B, T]; pad tokens carry none."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), window[:, 1:].flatten(), ignore_index=PAD, reduction=reduction
    )


@torch.no_grad()
def held_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, float]:
    """Mean loss on texts, cut into pieces of CONTEXT tokens that each start with <s>: nats a token, bits a character."""
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        for start in range(0, len(ids), CONTEXT - 1):
            piece = ids[start : start + CONTEXT - 1]
            rows.append([tokenizer.bos_token_id, *piece] + [tokenizer.pad_token_id] * (CONTEXT - 1 - len(piece)))
    windows = torch.tensor(rows)
    nats = sum(float(next_token_loss(model, part, "sum")) for part in windows.split(BATCH))
    tokens = int((windows[:, 1:] != tokenizer.pad_token_id).sum())
    return {
        "tokens": tokens,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_character": round(nats / math.log(2) / sum(map(len, texts)), 4),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict, folder: Path) -> None:
    """Weights as float16, to be loaded as float32; each file appears under its name complete or not at all."""
    draft = folder.with_name(folder.name + ".draft")
    copy.deepcopy(model).half().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (draft / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for path in draft.iterdir():
        os.replace(path, folder / path.name)
    draft.rmdir()


def pretrain(data: Path, folder: Path, tokens: int) -> dict:
    """The whole recipe; returns the record that is also written to FOLDER/pretraining.json."""
    began = saved = time.monotonic()
    real = real_documents(data)
    tokenizer = train_tokenizer(real[:: STORY_EPOCHS // 2] + list(islice(corpus(10**12), 20000)))
    windows = training_windows(tokenizer, real, tokens)
    stories = read_texts(data / "tinystories" / "validation.jsonl")
    model = new_model(tokenizer)
    untrained = held_out(model, tokenizer, stories[:20])
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True
    )
    steps = len(windows) // BATCH
    prepared = time.monotonic()
    print(f"{windows.numel():,} tokens, {steps:,} steps, untrained {untrained}", flush=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = windows[step * BATCH : (step + 1) * BATCH].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            rate = (step + 1) * BATCH * CONTEXT / (time.monotonic() - prepared)
            print(f"step {step:5d}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps - 1:
            saved = time.monotonic()
            record = {
                "steps": step + 1,
                "of_steps": steps,
                "tokens": (step + 1) * BATCH * CONTEXT,
                "seconds": round(saved - began),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "tinystories_validation": held_out(model, tokenizer, stories),
                "untrained_on_20_stories": untrained,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            save(model, tokenizer, record, folder)
            print(json.dumps(record), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the embedded language model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/ and tiny_shakespeare/")
    parser.add_argument("--to", type=Path, required=True, help="folder that gets the model")
    parser.add_argument("--tokens", type=float, default=13e6, help="training tokens")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.data, arguments.to, int(arguments.tokens))


if __name__ == "__main__":
    main()
