"""Models: name -> (model, tokenizer, kind), and what can be known about a model before it is loaded.

A name is a folder, a hub id, 'embedded', or config:NAME for random weights (`smidgen.blank`). A folder never touches the
network. Weights are read from safetensors only;
code that comes with a model runs only if asked for. New heads are drawn on the CPU from the run's seed, and the global
random state is left as it was.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from smidgen import blank, quantised
from smidgen.config import ConfigError, nearest, notice
from smidgen.kinds import Kind, classifies, detect_kind, head_of
from smidgen.pixels import load_processor
from smidgen.quantising import BYTES, HEADS, bitsandbytes_request
from smidgen.stored import stored_bytes
from smidgen.untrusted import check_folder

__all__ = [
    "available_memory",
    "context_length",
    "describe_source",
    "fresh_parameters",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
    "wants_position_ids",
    "weights_bytes",
]

_CONTROL_GROUP = Path("/sys/fs/cgroup")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# These number positions from padding_idx + 1, so two of max_position_embeddings are never used.
_OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "longformer",
    "mpnet",
    "data2vec-text",
    "ibert",
    "xmod",
    "luke",
    "esm",
)


# ---------------------------------------------------------------------------------------------------- names


def resolve(name: str) -> str:
    """A model folder's path, or a hub id. Raises ConfigError for a folder that is missing or holds no model."""
    if blank.is_blank(name):
        found = blank.inner(name)
        if Path(found).suffix == ".json" and Path(found).is_file():
            return found
        try:
            if not Path(found).exists() and (close := nearest(found, blank.shipped())):
                raise ConfigError(f"there is no configuration '{found}': did you mean '{close}'?")
            return resolve(found)
        except ConfigError as error:
            raise ConfigError(f"{error}; configurations that ship: {', '.join(blank.shipped())}") from None
    path = Path(__file__).parent / "embedded" / "model" if name == "embedded" else Path(name).expanduser()
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise ConfigError(f"'{name}' is an adapter, not a model: give its base model ('{base}') and load it on top")
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ConfigError(f"'{name}' is no model folder: it has no config.json (it holds {held})")
    if path.is_file():
        raise ConfigError(f"'{name}' is a file, a model is a folder with config.json: give '{path.parent}'")
    local = name.startswith((".", "~", "/")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()) or name == "embedded"
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        hint = f"did you mean '{path.parent / close}'?" if close else "give a folder, a hub name (owner/name), or 'embedded'"
        raise ConfigError(f"there is no model folder '{name}': {hint}")
    return name


def describe_source(name: str) -> str:
    """How a model card names a model: its hub id, or its folder's name without the path."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def load_config(name: str, tokenizer: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, without its weights; of a blank one fitted to its tokenizer. Raises ConfigError."""
    from transformers import AutoConfig

    location = resolve(name)
    with _readable(name, "its configuration"):
        config = AutoConfig.from_pretrained(location, **_origin(location, trust_remote_code))
    if blank.is_blank(name):
        with _readable(name, "its configuration"):
            blank.fit(config, load_tokenizer(name, tokenizer, trust_remote_code=trust_remote_code, notify=lambda line: None))
    return config


def _origin(location: str, trust_remote_code: bool) -> dict[str, Any]:
    return {"local_files_only": Path(location).is_dir(), "trust_remote_code": trust_remote_code}


@contextlib.contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    """Quiet transformers for a load, and turn what it raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, HfHubHTTPError, SafetensorError) as error:
        if isinstance(error, ConfigError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())
        hint = "check the name and the files"
        if "trust_remote_code" in reason:
            hint = "the model brings code of its own: read it, then set trust_remote_code=true"
        elif "safetensors" in reason and not isinstance(error, SafetensorError):
            hint = "only safetensors are read, never pickles: convert the weights with save_pretrained where you trust them"
        elif not Path(resolve(name)).is_dir():
            hint = "check the hub name (owner/name) and the network, or give a folder"
        raise ConfigError(f"model '{name}': {what} cannot be read ({reason[:300]}): {hint}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------- loading


def load_tokenizer(
    name: str,
    own: str | None = None,
    *,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] = notice,
) -> Any:
    """The model's tokenizer, or that of a folder or hub id `own`, with a pad token. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    location = resolve(name) if own is None else str(Path(own).expanduser()) if Path(own).expanduser().exists() else own
    folder = Path(location)
    local = own is not None and (own.startswith((".", "~", "/")) or own.count("/") > 1)
    if local and not folder.exists():
        raise ConfigError(f"there is no tokenizer '{own}': give a folder with tokenizer.json, or a hub id (owner/name)")
    if own is None and blank.is_blank(name) and folder.exists() and not any((folder / f).is_file() for f in _TOKENIZER_FILES):
        raise ConfigError(f"'{name}' has no tokenizer of its own: name the folder or hub id of one with --tokenizer")
    name = own or name
    # transformers makes an empty tokenizer from config.json alone
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ConfigError(
            f"the model folder '{name}' has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): copy tokenizer.json and "
            f"tokenizer_config.json of its base model there, or AutoTokenizer.from_pretrained(BASE).save_pretrained('{name}')"
        )
    with _readable(name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(location, **_origin(location, trust_remote_code))
    if tokenizer.pad_token_id is None:
        for other in ("eos_token", "unk_token"):
            if getattr(tokenizer, other) is not None:
                tokenizer.pad_token = getattr(tokenizer, other)
                notify(f"the tokenizer of '{name}' has no pad token: its {other} '{tokenizer.pad_token}' is used, masked out")
                break
        else:
            raise ConfigError(f"the tokenizer of '{name}' has no pad, end or unknown token: set pad_token in its config")
    return tokenizer


def load_model(
    name: str,
    kind: str = "auto",
    dtype: str = "auto",
    num_labels: int | None = None,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    quantise: str | None = None,
    own_tokenizer: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] = notice,
    device_map: Any = None,
    offload_folder: Path | None = None,
) -> tuple[Any, Any, Kind]:
    """(model in eval mode, tokenizer or image processor, kind), through transformers' Auto classes.

    num_labels: classes of a labelled task, None where answers are free text. dtype 'auto': float32 on a CPU, else the
    checkpoint's. Parameters that the checkpoint does not hold are drawn on the CPU from `seed` and named by `fresh_parameters`;
    of a blank model all are drawn, and those of its embeddings named. own_tokenizer: folder or hub id, None: the model's.
    quantise 'nf4' (double quantisation, as in QLoRA) or 'int8': linear layers but the output head are held in that form by
    bitsandbytes, quantised on `device` one by one; all other tensors have `dtype`. A checkpoint that is quantised stays so.
    Memory: the weights once in RAM, and once on `device` if that is another; with `device_map`, where accelerate puts them,
    `offload_folder` among it. Raises ConfigError.
    """
    location = resolve(name)
    check_folder(Path(location))
    config = load_config(name, own_tokenizer, trust_remote_code=trust_remote_code)
    chosen: Kind = detect_kind(config, num_labels is not None) if kind == "auto" else kind  # type: ignore[assignment]
    auto_class = head_of(name, config, chosen, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = _origin(location, trust_remote_code) | {"use_safetensors": True}
    if classifies(chosen):
        if num_labels is None:
            raise ConfigError(f"kind '{chosen}' needs labelled rows: give a task, or data with columns text and label")
        options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}  # a head for other classes is replaced
    wanted, stored = _dtype(dtype, device), getattr(config, "quantization_config", None) is not None
    if quantise is not None:
        if blank.is_blank(name):
            raise ConfigError(f"quantise = {quantise}: random weights are not worth their codes: leave it out")
        if stored:
            raise ConfigError(f"the weights of '{name}' are stored quantised: leave quantise out")
        compute = wanted if wanted != "auto" else getattr(config, "dtype", None) or torch.bfloat16
        options["quantization_config"] = bitsandbytes_request(quantise, compute, HEADS if classifies(chosen) else None)
    if quantise is not None or stored:
        options["device_map"] = {"": str(device)}
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": None if offload_folder is None else str(offload_folder)}
    if chosen == "image":
        with _readable(name, "its image processor"):
            tokenizer = load_processor(location, **_origin(location, trust_remote_code))
    else:
        tokenizer = load_tokenizer(name, own_tokenizer, trust_remote_code=trust_remote_code, notify=notify)
    if blank.is_blank(name):
        with _readable(name, "its configuration"):
            model = blank.draw(auto_class, config, wanted, seed)
        notify(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights drawn from seed {seed}")
        return model.to(device).eval(), tokenizer, chosen
    with _readable(name, "its weights"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, info = auto_class.from_pretrained(location, dtype=wanted, output_loading_info=True, **options)
    fresh = tuple(
        sorted({*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])})
    )
    _check_fit(name, model, None if chosen == "image" else tokenizer, fresh)
    if fresh:
        shown = ", ".join(fresh[:4]) + (f" and {len(fresh) - 4} more" if len(fresh) > 4 else "")
        notify(f"{shown}: not in the checkpoint of '{name}', drawn from the seed")
    if chosen == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token of a row by it
    model.smidgen_fresh = fresh
    if device_map is not None and fresh:
        raise ConfigError(
            f"{fresh[0]} is not in the checkpoint of '{name}' and would have to be drawn: leave out offload and device_map"
        )
    if device_map is not None:
        pass  # where accelerate put it
    elif "device_map" in options:
        quantised.refuse_unknown(model)
        quantised.steady(model)
    else:
        model = model.to(device)
    return model.eval(), tokenizer, chosen


def fresh_parameters(model: Any) -> tuple[str, ...]:
    """Names of the tensors that `load_model` drew because the checkpoint does not hold them (a new head)."""
    return getattr(model, "smidgen_fresh", ())


def _dtype(dtype: str, device: str | torch.device) -> Any:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else "auto"
    if dtype not in known:
        raise ConfigError(f"unknown dtype '{dtype}': auto, {', '.join(known)}")
    return known[dtype]


def _check_fit(name: str, model: Any, tokenizer: Any, fresh: tuple[str, ...]) -> None:
    tensors = model.state_dict()
    if len(fresh) > len(tensors) / 2:
        raise ConfigError(
            f"{len(fresh)} of the {len(tensors)} tensors of {type(model).__name__} are not in the weights of '{name}': "
            "config.json and weights belong to different models"
        )
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    marks = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    if tokenizer.vocab_size > rows or any(mark is not None and mark >= rows for mark in marks):
        raise ConfigError(
            f"the tokenizer of '{name}' has {len(tokenizer)} tokens and the model {rows}: they belong to different models"
        )


def wants_position_ids(model: Any) -> bool:
    """Whether left-padded rows need position_ids (a Collator option): forward takes them, counted from 0.

    Models of RoBERTa's family number positions by the padding token themselves. A PEFT model answers as its base.
    """
    import peft

    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return "position_ids" in inspect.signature(base.forward).parameters and base.config.model_type not in _OFFSET_POSITIONS


# ---------------------------------------------------------------------------------------------------- sizes


def context_length(config: Any, tokenizer: Any = None) -> int | None:
    """Positions that a model can read, or None where its architecture sets no limit (relative positions)."""
    values = config.get_text_config().to_dict()
    found = None
    if config.model_type not in ("t5", "mt5", "umt5", "longt5", "bloom"):
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"):
            if isinstance(values.get(key), int) and values[key] > 0:
                found = values[key]
                break
    if found is not None and config.model_type in _OFFSET_POSITIONS:
        found -= (config.pad_token_id or 0) + 1
    if tokenizer is not None and tokenizer.model_max_length < 10**9:  # transformers writes 1e30 for "no limit"
        found = min(found or tokenizer.model_max_length, tokenizer.model_max_length)
    return found


def weights_bytes(
    name: str,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    *,
    quantise: str | None = None,
    own_tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Bytes of the weights in `dtype`, linear layers quantised where asked for, without loading them.

    A folder's figure is read from the headers of its safetensors files, a hub id's is counted on a model without storage
    made from its configuration, as the weights that are quantised are.
    """
    location = resolve(name)
    wanted = _dtype(dtype, device)
    files = [] if blank.is_blank(name) else sorted(Path(location).glob("*.safetensors"))
    plain = stored_bytes(files, wanted)
    if files and quantise is None:
        return plain
    from transformers import AutoModel

    config = load_config(name, own_tokenizer, trust_remote_code=trust_remote_code)
    with _readable(name, "its architecture"), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    stored = config.dtype or torch.float32
    size = (stored if wanted == "auto" else wanted).itemsize
    if not files:
        plain = sum(parameter.numel() * size for parameter in model.parameters())
    if quantise is None:
        return plain
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")  # type: ignore[operator,misc]
    return plain - linear * size + math.ceil(linear * BYTES[quantise])


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that can still be allocated: free memory of a CUDA device; RAM within the limit of the control group."""
    import psutil

    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    free = psutil.virtual_memory().available
    for limit_file, used_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((_CONTROL_GROUP / limit_file).read_text())  # "max" where there is none
            used = int((_CONTROL_GROUP / used_file).read_text())
            stat = (_CONTROL_GROUP / limit_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        cache = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith(cache_key + " ")), 0)
        free = min(free, max(0, limit - (used - cache)))  # the kernel gives file cache back
    return free
