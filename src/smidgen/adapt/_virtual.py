"""Shared by schemes that put m virtual tokens before every row: prefix and prompt tuning. The implementation is PEFT's.

PEFT's parameter is one embedding matrix with a row for each virtual token, `prompt_encoder.default.embedding.weight`, in
float32; its rows are cast to the model's dtype in the forward. Virtual tokens take positions 0 .. m - 1 of the context and
the row's own start at m. Causal rows are padded at the left, between the virtual tokens and the text: positions are counted
over what the attention mask shows, so a padded row gives what it gives alone. (PEFT leaves positions out under prompt
tuning; without padding, or padded at the right, its own forward is the same. Its loss also predicts a row's first token, from
the last virtual one; ours has the same labels under every scheme.) Where attention has a sliding window, padding counts.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt._peft import load_adapter, new_modules, wrapped
from smidgen.adapt._place import Place, seen, try_inside
from smidgen.config import ConfigError
from smidgen.noise import philox
from smidgen.params import ParamView, tensor_id

NAME = "prompt_encoder.default.embedding.weight"  # PEFT's, under its default adapter name

_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS", "masked": "FEATURE_EXTRACTION"}
_ROW = 4  # tokens of the rows that try a new model out


def kind_of(model: nn.Module) -> str:
    """causal, seq2seq, classification or masked, from the head that the model's class has."""
    name = type(model).__name__
    if "ForSequenceClassification" in name:
        return "classification"
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return "seq2seq"
    return "masked" if name.endswith("ForMaskedLM") else "causal"


def random_tokens(seed: int, count: int, vocabulary: int) -> Tensor:
    """Token ids addressed by the run's seed, [count]; each token has probability 1 / vocabulary to 2^-32."""
    address = noise.Address(seed, tensor_id(NAME), 0, 0, philox.DATA)
    return philox.words(address, torch.arange(-(-count // 4))).flatten()[:count] % vocabulary


def random_normal(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 values addressed by the run's seed."""
    out = torch.zeros(*shape)
    noise.accumulate_(out, [(noise.Address(seed, tensor_id(NAME), 0, 0, philox.INIT), 1.0)], "gaussian")
    return out


def input_prompt(model: nn.Module, tokens: int, start: str, seed: int) -> tuple[Any, Callable[[], Tensor]]:
    """PEFT's options for virtual tokens before the input, and their first values: those of random real tokens, or with `start`
    = random standard normal numbers."""
    import peft

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, width = embedding.weight.shape

    def init() -> Tensor:
        if start == "random":
            return random_normal(seed, (tokens, width))
        with torch.no_grad():  # called, not indexed: Gemma's embedding scales what it looks up
            return embedding(random_tokens(seed, tokens, vocabulary).to(embedding.weight.device)).float()

    options = peft.PromptTuningConfig(
        num_virtual_tokens=tokens,
        num_transformer_submodules=1,  # two would hold a second half that PEFT never reads
        token_dim=width,
    )
    return options, init


class Virtual:
    """A model with virtual tokens; a new classification head is tuned whole beside them."""

    def __init__(
        self, model: nn.Module, config: Any, init: Callable[[], Tensor], fresh: Sequence[str], place: Place | None = None
    ):
        """`config`: PEFT's, without its task; `init`: the values of the embedding matrix; `place`: where causal models see the
        virtual tokens, None: before the row."""
        kind = kind_of(model)
        config.task_type = _TASKS[kind]
        heads = new_modules(model, set(fresh))
        config.modules_to_save = heads or None
        values = init()
        with torch.random.fork_rng(devices=[]):  # PEFT draws the matrix; it is written over
            self.model: nn.Module = wrapped(model, config)
        self.model.train(model.training)
        if config.peft_type.value == "PROMPT_TUNING":
            self.model.get_prompt = types.MethodType(_prompts, self.model)  # type: ignore[assignment]
        matrix = self.model.get_parameter(NAME)
        matrix.data.copy_(values)
        for name, parameter in self.model.named_parameters():  # PEFT tunes every classification head, new or not
            new = any(f"{head}.modules_to_save" in name for head in heads)
            parameter.requires_grad_(parameter is matrix or new)
        _try_out(self.model, matrix, kind)
        if kind == "causal":
            seen(model, place or Place())
            if place is not None and place.position:
                try_inside(self.model, matrix, place.tokens)
        self.view = ParamView.of_model(self.model)
        self.fresh = list(self.view.entries)

    def save(self, folder: Path) -> None:
        """PEFT's adapter files."""
        self.model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, folder: Path) -> None:
        """Read adapter files into the tuned tensors."""
        load_adapter(self.model, folder)

    def merged(self) -> nn.Module:
        raise ConfigError("virtual tokens are inputs, not weights, and cannot be merged into a model: export the adapter")


def _prompts(self: Any, batch_size: int, *_: Any, **__: Any) -> Tensor:
    """PEFT's prompts for a batch [B, m, h], with those of each row where a population's rows have prompts of their own."""
    adapter = self.active_adapter
    encoder = self.prompt_encoder[adapter]
    found = encoder(self.prompt_tokens[adapter][None].to(encoder.embedding.weight.device))
    return found if len(found) == batch_size else found.expand(batch_size, -1, -1)


def _try_out(model: nn.Module, matrix: Tensor, kind: str) -> None:
    """Raise ConfigError where PEFT's virtual tokens do not reach the model's output, or spoil its padding."""
    base = model.get_base_model()  # type: ignore[operator]
    name = type(base).__name__
    way_out = "use scheme lora or full" + (", or kind causal" if kind == "classification" else "")
    row = torch.arange(3, 3 + _ROW, device=matrix.device)[None] % base.config.get_text_config().vocab_size
    saved = matrix.detach().clone()

    def logits(padding: int) -> Tensor:
        pad = torch.full((1, padding), base.config.get_text_config().pad_token_id or 0, device=row.device)
        inputs = {"input_ids": torch.cat([row, pad], 1), "attention_mask": torch.cat([row * 0 + 1, pad * 0], 1)}
        if kind == "seq2seq":
            inputs["decoder_input_ids"] = row
        return model(**inputs).logits[:, -_ROW:].float()

    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone, padded = logits(0), logits(2)
            matrix.data.fill_(torch.nan)
            read = not bool(torch.isfinite(logits(0)).any())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigError(f"PEFT cannot give {name} virtual tokens ({str(error)[:200]}): {way_out}") from None
    finally:
        matrix.data.copy_(saved)
        model.train(mode)
    if not read:
        raise ConfigError(f"{name} does not read the virtual tokens that PEFT gives it: {way_out}")
    if kind == "classification" and not torch.allclose(alone, padded, rtol=1e-2, atol=1e-2 * float(alone.std())):
        raise ConfigError(f"{name} takes padding for text once PEFT has put virtual tokens before it: {way_out}")
