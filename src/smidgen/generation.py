"""Generation: greedy answers of prompts at theta + probe, in batches of like length, through the model's `generate`.

Does not do: sampling, beams, a displaced weight that outlives a module's forward (each new token displaces them again).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from smidgen.batched import BatchedEngine
from smidgen.collate import Collator
from smidgen.directions import Probe
from smidgen.drafts import IGNORED
from smidgen.encode import Encoded, encode_prompts
from smidgen.probing import Batch, Engine
from smidgen.questions import MAX_NEW_TOKENS, Prompts
from smidgen.scoring import in_batches, on_device


class Answerer:
    """Answers prompts with the first line of a greedy continuation, white space around it dropped.

    An answer ends at a line's end, at the model's end token or after `max_new_tokens`. With `whole_text` it goes past
    line ends and is given as it is.
    """

    def __init__(self, tokenizer: Any, kind: str, *, max_new_tokens: int = MAX_NEW_TOKENS, whole_text: bool = False):
        self.tokenizer, self.kind = tokenizer, kind
        self.max_new_tokens, self.whole_text = max_new_tokens, whole_text
        self._prepared = False

    def __call__(self, engine: Engine, batch: Batch, probe: Probe = ()) -> list[str]:
        """Answers of one batch of prompts (input_ids, attention_mask). Counted as one forward, whatever its length."""
        prompts = self._prompts(engine, batch)
        return self._texts(engine.call(self._generating(engine.model, prompts), probe), prompts)

    def together(self, engine: Engine, batch: Batch, probes: Sequence[Probe]) -> list[list[str]]:
        """Answers at theta + each probe, [P][B]. An engine that sees several probes at once (`smidgen.batched`) continues the
        prompts of as many of them as its memory allows in one call of `generate`; else one probe at a time."""
        prompts = self._prompts(engine, batch)
        rows, width = prompts["input_ids"].shape

        def answer(many: Batch) -> list[str]:
            given = {key: many[key] for key in prompts}
            return self._texts(self._generating(engine.model, given)(), given)

        found = None
        if isinstance(engine, BatchedEngine):
            longer = (width + self.max_new_tokens) / width
            found = engine.call_together(answer, with_labels(prompts), probes, longer=longer)
        if found is None:
            return [self(engine, batch, probe) for probe in probes]
        texts = [text for part in found for text in part]
        return [texts[first : first + rows] for first in range(0, len(texts), rows)]

    def _prompts(self, engine: Engine, batch: Batch) -> Batch:
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if not self._prepared:
            engine.prepare(with_labels(prompts))
            self._prepared = True
        return prompts

    def _generating(self, model: Any, prompts: Batch) -> Any:
        """A call of the model's `generate` on prompts."""
        own = model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        if not self.whole_text:
            ends |= set(self._line_ends)
        return functools.partial(
            model.generate,
            **prompts,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(end for end in ends if end is not None) or None,
        )

    def _texts(self, out: Any, prompts: Batch) -> list[str]:
        if self.kind == "causal":
            out = out[:, prompts["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts if self.whole_text else [text.partition("\n")[0].strip() for text in texts]

    @functools.cached_property
    def _line_ends(self) -> list[int]:
        """Tokens whose text has a line's end in it."""
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        spelled = ("\n", "Ċ", "<0x0A>")  # as it is, in byte-level BPE, as SentencePiece's byte
        likely = [i for i, piece in enumerate(pieces) if piece and any(end in piece for end in spelled)]
        return [i for i in likely if "\n" in self.tokenizer.decode([i])]


def with_labels(batch: Batch) -> Batch:
    """A batch of prompts whose every token carries loss, for what wants a batch with labels; any other as it is."""
    if "labels" in batch:
        return batch
    inputs: Batch = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    return {**inputs, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def answer_all(engine: Engine, answerer: Answerer, prompts: Prompts | Encoded, batch_size: int, probe: Probe = ()) -> list[str]:
    """Answers of all prompts, in their order."""
    collator = Collator(answerer.tokenizer.pad_token_id, answerer.kind)
    texts = [""] * len(prompts)
    for chosen in in_batches(range(len(prompts)), prompts.lengths, batch_size):
        batch = on_device(collator([prompts[i] for i in chosen]), engine)
        for i, text in zip(chosen, answerer(engine, batch, probe), strict=True):
            texts[i] = text
    return texts


def generate(
    engine: Engine,
    tokenizer: Any,
    examples: Sequence[Any],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    probe: Probe = (),
    kind: str = "causal",
) -> list[str]:
    """Greedy continuations of examples' prompts at theta + probe, past line ends, as they are."""
    answerer = Answerer(tokenizer, kind, max_new_tokens=max_new_tokens, whole_text=True)
    return answer_all(engine, answerer, encode_prompts(examples, tokenizer, kind), batch_size, probe)
