"""Pre-train the embedded causal language model: a Llama of 2 million parameters, from nothing, on one CPU core.

Text: TinyStories and tiny Shakespeare from a folder that the caller names, and the documents of ``make_data.py``.
Recipe: byte-level BPE of 2048 tokens; one document ``<s> text </s>`` a sequence, batches of 1024 tokens, generated documents
seen once; AdamW, linear warm-up, cosine decay to a tenth; forward and backward in bfloat16 autocast, weights
and state in float32; stored as float16, loaded as float32. Seeded; the same machine, versions and thread count give the same
weights. Cost: about 6 floating-point operations a weight and token for 2 million weights, some 0.6 GB of memory.
It does not search hyper-parameters: every constant below is chosen, not tuned, unless it says otherwise.

    python -m smidgen.embedded.pretrain --data DATA --to FOLDER [--tokens 8e6] [--threads 1]

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

from smidgen.embedded.make_data import SIMPLE, TEXT_SEED, corpus

VOCAB, CONTEXT = 2048, 256
BATCH_TOKENS, POOL = 1024, 256  # padded tokens a step; documents sorted by length together
PAD = 0  # the first special token
LR, FINAL, WARMUP, DECAY, CLIP = 2e-3, 0.1, 300, 0.1, 1.0
SIMPLE_SHARE = 0.12
STORY_EPOCHS, SHAKESPEARE_EPOCHS = 4, 1  # how often each real document is used
SEED, SAVE_SECONDS = 0, 120
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
    scenes = [""]
    for block in blocks:
        scenes[-1] += block + "\n\n"
        if len(scenes[-1]) > 800:
            scenes.append("")
    return (
        read_texts(data / "tinystories" / "train.jsonl") * STORY_EPOCHS
        + [scene.strip() for scene in scenes if scene.strip()] * SHAKESPEARE_EPOCHS
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


def pieces(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids without <s> -> sequences ``<s> ... </s>`` of at most CONTEXT tokens; long texts are cut into several."""
    cut = []
    for row in rows:
        row = [*row, tokenizer.eos_token_id]
        cut += [[tokenizer.bos_token_id, *row[at : at + CONTEXT - 1]] for at in range(0, len(row), CONTEXT - 1)]
    return cut


def training_batches(tokenizer: PreTrainedTokenizerFast, real: list[str], tokens: int) -> list[list[list[int]]]:
    """Simple generated documents for SIMPLE_SHARE of `tokens`, then real ones and the whole mix, in batches of like length.

    One sequence holds one document, as a prompt does: no document of another tone or topic stands before it.
    """

    def encoded(documents: Iterator[str], wanted: int) -> list[list[int]]:
        rows: list[list[int]] = []
        while wanted > 0:
            fresh = pieces(tokenizer(list(islice(documents, 2048)), add_special_tokens=False)["input_ids"], tokenizer)
            wanted -= sum(map(len, fresh))
            rows += fresh
        return rows

    rng = random.Random(SEED)
    simple = encoded(corpus(10**12, SIMPLE, TEXT_SEED + 1), int(SIMPLE_SHARE * tokens))
    rows = pieces(tokenizer(real, add_special_tokens=False)["input_ids"], tokenizer)
    rows += encoded(corpus(10**12), tokens - sum(map(len, simple)) - sum(map(len, rows)))
    rng.shuffle(rows)
    rows = simple + rows
    batches: list[list[list[int]]] = []
    for start in range(0, len(rows), POOL):
        pool: list[list[list[int]]] = [[]]
        for row in sorted(rows[start : start + POOL], key=len):
            if len(row) * (len(pool[-1]) + 1) > BATCH_TOKENS:
                pool.append([])
            pool[-1].append(row)
        rng.shuffle(pool)
        batches += pool
    return batches


def padded(rows: list[list[int]]) -> Tensor:
    """int64 [rows, longest]. Padding stands on the right, so causal attention never sees it."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


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
    """Loss on texts and their ends, in pieces of at most CONTEXT tokens: nats a token, bits a character."""
    rows = pieces(tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer)
    nats = sum(float(next_token_loss(model, padded(rows[at : at + 8]), "sum")) for at in range(0, len(rows), 8))
    tokens = sum(len(row) - 1 for row in rows)
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
    batches = training_batches(tokenizer, real, tokens)
    stories = read_texts(data / "tinystories" / "validation.jsonl")
    model = new_model(tokenizer)
    untrained = held_out(model, tokenizer, stories[:20])
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True
    )
    steps = len(batches)
    total = sum(map(len, (row for batch in batches for row in batch)))
    prepared = time.monotonic()
    print(f"{total:,} tokens, {steps:,} steps, untrained {untrained}", flush=True)
    seen = 0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        seen += sum(map(len, batch))
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, padded(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0:
            rate = seen / (time.monotonic() - prepared)
            print(f"step {step:5d}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps - 1:
            saved = time.monotonic()
            record = {
                "steps": step + 1,
                "of_steps": steps,
                "tokens": seen,
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
    parser.add_argument("--tokens", type=float, default=8e6, help="training tokens")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.data, arguments.to, int(arguments.tokens))


if __name__ == "__main__":
    main()
