"""Write a tuned model for stock transformers or PEFT, load it in a fresh process and compare its logits."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from smidgen import adapt, models, quantised
from smidgen import folder as folders
from smidgen.adapt._over_quantised import OverQuantised
from smidgen.adapt._peft import with_adapter
from smidgen.config import ConfigError, RunConfig, UserError
from smidgen.inference import open_folder
from smidgen.run import Loaded, device

_TOKENS = 12  # of the row that is compared

# Runs without smidgen: only what a user of the export has.
_RELOAD = """
import json, sys, torch, transformers
folder, kind, library, given, out, base = sys.argv[1:]
base, options = json.loads(base), {}  # how its base was quantised
if base:
    request = transformers.BitsAndBytesConfig.from_dict(base["quantization_config"])
    options = {"quantization_config": request, "dtype": base["dtype"], "device_map": {"": base["device"]}}
if library == "peft":
    import peft
    auto = {"causal": peft.AutoPeftModelForCausalLM, "classification": peft.AutoPeftModelForSequenceClassification,
            "seq2seq": peft.AutoPeftModelForSeq2SeqLM}.get(kind)
    if auto is None:
        config = peft.PeftConfig.from_pretrained(folder)
        auto = {"masked": transformers.AutoModelForMaskedLM, "image": transformers.AutoModelForImageClassification}[kind]
        plain = auto.from_pretrained(config.base_model_name_or_path, **options)
        model = peft.PeftModel.from_pretrained(plain, folder)
    else:
        model = auto.from_pretrained(folder, **options)
else:
    auto = {"causal": transformers.AutoModelForCausalLM, "classification": transformers.AutoModelForSequenceClassification,
            "seq2seq": transformers.AutoModelForSeq2SeqLM, "masked": transformers.AutoModelForMaskedLM,
            "image": transformers.AutoModelForImageClassification}[kind]
    model = auto.from_pretrained(folder)
model.eval()
for module in model.modules():  # bitsandbytes would round, on a CPU, the scales of 4-bit weights and the inputs of 8-bit ones
    if type(module).__name__ == "Linear4bit" and hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
    if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):
        module.train()
with torch.no_grad():
    inputs = {name: value.to(model.device) for name, value in torch.load(given, weights_only=True).items()}
    torch.save(model(**inputs).logits.float().cpu(), out)
"""


def export(run: Path, to: Path, form: str, base: str | None = None) -> dict[str, Any]:
    """Export a run's result. Returns format, loader and the largest difference of logits after reloading.

    base: the unquantised model that takes the adapter of a quantised one up, where `merged` is asked for; by the error of
    quantisation it is another model than the one that was tuned. Raises ConfigError for a format that the scheme cannot
    write or an occupied folder, UserError when the reloaded model does not give the same logits (to 1e-4 in float32, 2e-2
    in 16 bits).
    """
    folders.refuse_occupied(to, force=False)
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"{to} is not empty: choose another folder with --to")
    loaded, config = open_folder(str(run))
    scheme, adapted, tokenizer = adapt.get(config.scheme), loaded.adapted, loaded.tokenizer
    over = isinstance(adapted, OverQuantised)
    forms = adapted.EXPORTS if over else scheme.EXPORTS
    if form not in forms:
        reason = f" ({scheme.REFUSED[form]})" if form in scheme.REFUSED else ""
        raise ConfigError(f"scheme {config.scheme} cannot be exported as {form!r}{reason}: it has {', '.join(forms) or 'none'}")
    model = adapted.model.eval()
    if form == "merged" and base is not None:
        if not quantised.layers(model) or not (over or config.scheme in ("lora", "velora")):
            raise ConfigError(f"--base {base}: only an adapter of a quantised model is merged into another; leave it out")
        adapted = _on_base(base, run, loaded, config)
        model = adapted.model.eval()
    place = next(model.parameters()).device
    inputs = _pixels(model) if loaded.kind == "image" else _inputs(loaded.kind, len(tokenizer))
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
        theirs = _reload(to, loaded.kind, library, inputs, _request(config.quantise, model) if library == "peft" else None)
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


def _pixels(model: Any) -> dict[str, torch.Tensor]:
    """A fixed picture of grey steps."""
    size, channels = model.config.image_size, model.config.num_channels
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.linspace(-1, 1, channels * height * width).view(1, channels, height, width)}


class _OnBase:
    """An unquantised model with the adapter of a run."""

    def __init__(self, model: Any):
        self.model = model

    def merged(self) -> Any:
        return self.model.merge_and_unload()


def _on_base(base: str, run: Path, loaded: Loaded, config: RunConfig) -> _OnBase:
    """The unquantised model `base` with the adapter files of a run. Raises ConfigError where they do not fit."""
    classes = loaded.adapted.model.config.num_labels if loaded.kind == "classification" else None
    options: dict[str, Any] = {"seed": config.seed % 2**63, "trust_remote_code": config.trust_remote_code}
    plain, _, _ = models.load_model(base, loaded.kind, config.dtype, classes, device(), **options)
    if quantised.layers(plain):
        raise ConfigError(f"--base {base} is quantised itself: give the model that was quantised")
    try:
        return _OnBase(with_adapter(plain, run))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--base {base} does not take up the adapter in {run} ({str(error).splitlines()[0][:200]})") from None


def _request(quantise: str | None, model: Any) -> dict[str, Any] | None:
    """How stock transformers loads the base of an adapter, where a run quantised it."""
    if quantise is None:
        return None
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    request = model.config.quantization_config.to_dict()
    place = next(model.parameters()).device
    return {"quantization_config": request, "dtype": str(dtype).removeprefix("torch."), "device": str(place)}


def _reload(
    folder: Path, kind: str, library: str, inputs: dict[str, torch.Tensor], base: dict[str, Any] | None
) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "inputs.pt", Path(temporary) / "logits.pt"
        torch.save(inputs, given)
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder), kind, library, str(given), str(out), json.dumps(base)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{library} cannot load the export in {folder}: {last}")
        return torch.load(out, weights_only=True)
