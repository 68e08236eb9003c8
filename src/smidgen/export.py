"""Write a tuned model for stock transformers or PEFT, load it in a fresh process and compare its logits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from smidgen import adapt
from smidgen import folder as folders
from smidgen.config import ConfigError, UserError
from smidgen.inference import open_folder

_TOKENS = 12  # of the row that is compared

# Runs without smidgen: only what a user of the export has.
_RELOAD = """
import sys, torch, transformers
folder, kind, library, given, out = sys.argv[1:]
if library == "peft":
    import peft
    auto = {"causal": peft.AutoPeftModelForCausalLM, "classification": peft.AutoPeftModelForSequenceClassification,
            "seq2seq": peft.AutoPeftModelForSeq2SeqLM}.get(kind)
    if auto is None:
        config = peft.PeftConfig.from_pretrained(folder)
        base = transformers.AutoModelForMaskedLM.from_pretrained(config.base_model_name_or_path)
        model = peft.PeftModel.from_pretrained(base, folder)
    else:
        model = auto.from_pretrained(folder)
else:
    auto = {"causal": transformers.AutoModelForCausalLM, "classification": transformers.AutoModelForSequenceClassification,
            "seq2seq": transformers.AutoModelForSeq2SeqLM, "masked": transformers.AutoModelForMaskedLM}[kind]
    model = auto.from_pretrained(folder)
with torch.no_grad():
    torch.save(model.eval()(**torch.load(given, weights_only=True)).logits.float(), out)
"""


def export(run: Path, to: Path, form: str) -> dict[str, Any]:
    """Export a run's result. Returns format, loader and the largest difference of logits after reloading.

    Raises ConfigError for a format that the scheme cannot write or an occupied folder, UserError when the reloaded
    model does not give the same logits (to 1e-4 in float32, 2e-2 in 16 bits).
    """
    folders.refuse_occupied(to, force=False)
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"{to} is not empty: choose another folder with --to")
    loaded, config = open_folder(str(run))
    scheme = adapt.get(config.scheme)
    if form not in scheme.EXPORTS:
        reason = f" ({scheme.REFUSED[form]})" if form in scheme.REFUSED else ""
        raise ConfigError(f"scheme {config.scheme} cannot be exported as {form!r}{reason}: it has {', '.join(scheme.EXPORTS)}")
    adapted, tokenizer = loaded.adapted, loaded.tokenizer
    model = adapted.model.eval()
    place = next(model.parameters()).device
    inputs = _inputs(loaded.kind, len(tokenizer))
    with torch.no_grad():
        ours = model(**{k: v.to(place) for k, v in inputs.items()}).logits.float().cpu()
    with folders.locked(to):
        if form == "merged":
            adapted.merged().save_pretrained(to)
            tokenizer.save_pretrained(to)
        elif form in ("peft-supertuning", "peft-shira"):
            adapted.export(to, form)
            tokenizer.save_pretrained(to)
        else:
            folders.publish(adapted, tokenizer, to)
        library = "transformers" if form == "merged" else "peft"
        theirs = _reload(to, loaded.kind, library, inputs)
    (to / ".lock").unlink(missing_ok=True)
    difference = float((ours - theirs).abs().max())
    allowed = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
    if not difference <= allowed * max(1.0, float(ours.abs().max())):
        raise UserError(f"{library} loads {to} but its logits differ by {difference:.3g} (allowed {allowed:g}): do not use it")
    return {"format": form, "output": str(to), "loader": library, "max_difference": difference}


def _inputs(kind: str, vocabulary: int) -> dict[str, torch.Tensor]:
    """A fixed row of tokens."""
    ids = (torch.arange(_TOKENS) * 37 % max(8, vocabulary - 8) + 4)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


def _reload(folder: Path, kind: str, library: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "inputs.pt", Path(temporary) / "logits.pt"
        torch.save(inputs, given)
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder), kind, library, str(given), str(out)], capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{library} cannot load the export in {folder}: {last}")
        return torch.load(out, weights_only=True)
