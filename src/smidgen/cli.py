"""The `smidgen` command: one function a verb, each thin. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from smidgen import __version__
from smidgen.blank import HELP as BLANK_HELP
from smidgen.blank import chosen_name
from smidgen.compare_command import compare, report
from smidgen.config import ConfigError, UserError, options, speaker
from smidgen.config_file import load, split_arguments
from smidgen.plan_command import plan
from smidgen.tables import table

app = typer.Typer(
    name="smidgen",
    help="Fine-tune any Hugging Face language model in little more memory than it takes to run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HELP = {option.key: option.help for option in options()}

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def _flag(key: str, *names: str) -> Any:
    return typer.Option(*(names or (f"--{key.replace('_', '-')}",)), help=_HELP[key], show_default=False)


def _text(key: str, *names: str) -> Any:
    return Annotated[Optional[str], _flag(key, *names)]  # noqa: UP045 - typer reads this at run time


def _number(key: str, *names: str) -> Any:
    return Annotated[Optional[int], _flag(key, *names)]  # noqa: UP045


def _real(key: str, *names: str) -> Any:
    return Annotated[Optional[float], _flag(key, *names)]  # noqa: UP045


def _print(values: Any) -> None:
    print(json.dumps(values, indent=2, default=str))


@app.command()
def train(
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[CONFIG.yaml] [KEY=VALUE]...", help="configuration file, and overrides such as train.max_steps=100"
        ),
    ] = None,
    model: _text("model", "--model", "-m") = None,  # type: ignore[valid-type]
    task: _text("task", "--task", "-t") = None,  # type: ignore[valid-type]
    data: _text("data", "--data", "-d") = None,  # type: ignore[valid-type]
    eval_data: _text("eval_data") = None,  # type: ignore[valid-type]
    method: _text("method") = None,  # type: ignore[valid-type]
    preset: _text("preset") = None,  # type: ignore[valid-type]
    scheme: _text("scheme") = None,  # type: ignore[valid-type]
    objective: _text("objective") = None,  # type: ignore[valid-type]
    reward: _text("reward") = None,  # type: ignore[valid-type]
    steps: _number("train.max_steps", "--steps") = None,  # type: ignore[valid-type]
    lr: _real("train.learning_rate", "--lr") = None,  # type: ignore[valid-type]
    batch: _number("train.per_device_train_batch_size", "--batch") = None,  # type: ignore[valid-type]
    eps: Annotated[Optional[float], typer.Option(help="size of a probe, for methods that probe", show_default=False)] = None,  # noqa: UP045
    max_length: _number("max_length") = None,  # type: ignore[valid-type]
    train_rows: _number("train_rows") = None,  # type: ignore[valid-type]
    dev_rows: _number("dev_rows") = None,  # type: ignore[valid-type]
    kind: _text("kind") = None,  # type: ignore[valid-type]
    dtype: _text("dtype") = None,  # type: ignore[valid-type]
    from_config: Annotated[Optional[str], typer.Option(help=BLANK_HELP, show_default=False)] = None,  # noqa: UP045
    tokenizer: _text("tokenizer") = None,  # type: ignore[valid-type]
    quantise: _text("quantise") = None,  # type: ignore[valid-type]
    seed: _number("seed") = None,  # type: ignore[valid-type]
    threads: _number("threads") = None,  # type: ignore[valid-type]
    output: _text("output", "--output", "-o") = None,  # type: ignore[valid-type]
    resume: Annotated[bool, _flag("resume", "--resume")] = False,
    force: Annotated[bool, _flag("force", "--force")] = False,
    trust_remote_code: Annotated[bool, _flag("trust_remote_code", "--trust-remote-code")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the configuration, train nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tune a model on a task or on your data.

    With a model and data alone, everything else is chosen and printed: `smidgen train --model M --data my.jsonl`.
    Every key of a configuration can be set as KEY=VALUE; `smidgen init` writes a commented configuration file.
    """
    given = dict(locals())
    path, overrides = split_arguments(given.pop("arguments"))
    for name in ("dry_run", "as_json"):
        given.pop(name)
    for name in ("resume", "force", "trust_remote_code"):
        given[name] = given[name] or None
    given["model"] = chosen_name(model, given.pop("from_config"))
    config = load(path, overrides, given)
    from smidgen.progress import summary
    from smidgen.run import finetune

    result = finetune(config, dry_run=dry_run, say=(lambda line: print(line, file=sys.stderr, flush=True)) if as_json else _say)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        _print(result)
    elif dry_run:
        print(result["config"], end="")
        print(f"# dry run: {result['rows']} rows, nothing was trained; the run would be written to {result['output']}")
    else:
        print(summary(result))


def _say(line: str) -> None:
    print(line, flush=True)


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="DIR", help="a run's folder, or any model's")],
    task: _text("task", "--task", "-t") = None,  # type: ignore[valid-type]
    data: _text("data", "--data", "-d") = None,  # type: ignore[valid-type]
    split: Annotated[str, typer.Option(help="train, dev or test")] = "dev",
    batch: _number("train.per_device_eval_batch_size", "--batch") = None,  # type: ignore[valid-type]
    reward: _text("reward") = None,  # type: ignore[valid-type]
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="generate answers and compare them with the given ones")
    ] = False,
    lm_eval: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="tasks of lm_eval, a,b; with --data local mmlu, gsm8k, bbh, humaneval or tydiqa", show_default=False),
    ] = None,
    shots: Annotated[Optional[int], typer.Option(min=0, help="of --lm-eval: examples shown; none: the task's")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(min=1, help="of --lm-eval: questions of each task")] = None,  # noqa: UP045
    run_code: Annotated[bool, typer.Option("--run-code", help="of --lm-eval: execute programs that the model writes")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="of --lm-eval: ask in the model's chat template")] = False,
    as_json: Json = False,
) -> None:
    """Loss and accuracy of a run, or of any model, on a split; or its measures under lm_eval."""
    if lm_eval is not None:
        from smidgen.harness import harness

        names = lm_eval.split(",")
        _print(harness(run, names, data=data, shots=shots, limit=limit, batch_size=batch, run_code=run_code, chat=chat))
        return
    from smidgen.inference import evaluate_folder

    found = evaluate_folder(run, task=task, data=data, split=split, batch_size=batch, match=exact_match, reward=reward)
    _print(found) if as_json else print(
        "\n".join(f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in found.items())
    )


@app.command()
def generate(
    run: Annotated[str, typer.Argument(metavar="DIR", help="a run's folder, or any model's")],
    prompt: Annotated[list[str] | None, typer.Argument(help="texts to continue; none: one a line from standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of a continuation")] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="wrap each prompt in the model's chat template")] = False,
    as_json: Json = False,
) -> None:
    """Continue prompts with a tuned model (greedy)."""
    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("nothing to continue: give a prompt, or lines on standard input")
    from smidgen.inference import generate_from_folder

    texts = generate_from_folder(run, prompts, max_new_tokens=max_new_tokens, chat=chat)
    if as_json:
        _print([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)])
    else:
        for p, t in zip(prompts, texts, strict=True):
            print(p + t)


@app.command()
def replay(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the model that the run started from")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder")],
    to: Annotated[Path, typer.Option("--to", help="where the model is written")],
    at: Annotated[Optional[int], typer.Option("--at", min=0, help="stop after so many steps; none: all")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Rebuild a run's weights from its journal, bit for bit, without a forward pass."""
    from smidgen.rebuild import replay as rebuild

    result = rebuild(base, run, to, at=at)
    _print(result) if as_json else print(
        f"{result['steps']} steps in {result['seconds']:.1f} s; weights_sha256 {result['weights_sha256']}; written to {to}"
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder")],
    to: Annotated[Path, typer.Option("--to", help="where the export is written")],
    form: Annotated[str, typer.Option("--format", help="adapter, merged, peft-lora, peft-supertuning, peft-shira")] = "merged",
    base: Annotated[Optional[str], typer.Option(help="merged, of a run over a quantised base: the model unquantised")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write a tuned model for stock transformers or PEFT, load it in a fresh process and compare its logits."""
    from smidgen.export import export as write

    result = write(run, to, form, base)
    difference = f"largest logit difference {result['max_difference']:.3g}"
    _print(result) if as_json else print(f"{form} written to {to}; reloaded by {result['loader']}: {difference}")


@app.command("init")
def initialise(
    to: Annotated[Path, typer.Argument(metavar="[FILE]", help="where the file is written; - prints it")] = Path("smidgen.yaml"),
) -> None:
    """Write a commented configuration file with every key and its default."""
    from smidgen.config_file import template

    text = template()
    if str(to) == "-":
        print(text, end="")
        return
    if to.exists():
        raise ConfigError(f"{to} exists: choose another name")
    to.write_text(text, encoding="utf-8")
    print(f"wrote {to}; run it with: smidgen train {to}")


@app.command()
def methods(
    name: Annotated[Optional[str], typer.Argument(help="a method, for its options")] = None,  # noqa: UP045
    presets: Annotated[bool, typer.Option("--presets", help="list the published presets, of the method or all")] = False,
    as_json: Json = False,
) -> None:
    """List the methods, or show one method's source, cost and options."""
    from smidgen.listing import describe_method, list_methods, list_presets

    if presets:
        listed = list_presets(name)
        if as_json:
            _print(listed)
            return
        rows = [(p["name"], *(f"{p['options'].get(k, '-')}" for k in ("lr", "eps")), p["source"]) for p in listed]
        table(("preset", "lr", "eps", "source"), rows)
    elif name is None:
        found: Any = list_methods()
        _print(found) if as_json else table(
            ("method", "status", "what it is"), [(m["name"], m["status"], m["title"]) for m in found]
        )
    else:
        one = describe_method(name)
        if as_json:
            _print(one)
            return
        print(one["text"] + "\n")
        table(("option", "default", "meaning"), [(o["name"], str(o["default"]), o["description"]) for o in one["options"]])
        for preset, values in one["presets"].items():
            print(f"preset {preset}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
        if one["published"]:
            print(f"{len(one['published'])} published presets: smidgen methods {name} --presets")


@app.command("tasks")
def list_tasks(
    name: Annotated[Optional[str], typer.Argument(help="a task, for its options")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """List the tasks, or show one task's prompts, options and numbers of rows."""
    from smidgen.listing import describe_task
    from smidgen.listing import list_tasks as listing

    found: Any = listing() if name is None else describe_task(name)
    if as_json:
        _print(found)
    elif name is None:
        table(("task", "what it is"), [(t["name"], t["title"]) for t in found])
    else:
        print(found["text"], "", *(f"prompt of a {k} model: {p!r}" for k, p in found["prompts"].items()), sep="\n")
        table(("option", "default", "meaning"), [(o["name"], str(o["default"]), o["description"]) for o in found["options"]])
        if found["sizes"]:
            print("benchmark_split: {} rows to train on, {} dev rows, {} test rows".format(*found["sizes"]))


@app.command("data")
def show_data(
    source: Annotated[str, typer.Argument(metavar="DATA", help="a task's name, a file, a folder or a hub id")],
    model: _text("model", "--model", "-m") = None,  # type: ignore[valid-type]
    kind: _text("kind") = None,  # type: ignore[valid-type]
    row: Annotated[int, typer.Option(min=0, help="which row to show")] = 0,
    max_length: _number("max_length") = None,  # type: ignore[valid-type]
    as_json: Json = False,
) -> None:
    """Show the lengths of a data set and one encoded row; the part that carries no loss is dimmed."""
    from smidgen.listing import describe_data

    found = describe_data(source, model=model or "embedded", kind=kind or "auto", row=row, max_length=max_length)
    if as_json:
        _print(found)
        return
    from rich.console import Console
    from rich.text import Text

    length = found["length"]
    print(f"{found['rows']} rows, {found['tokens']} tokens, {found['label_tokens']} carry loss; cut at {found['max_length']}")
    print(f"tokens a row: min {length['min']}, median {length['median']}, p95 {length['p95']}, max {length['max']}")
    most = max(count for *_, count in found["histogram"])
    for low, high, count in found["histogram"]:
        print(f"  {low:>5}-{high:<5} {count:>6} {'#' * round(40 * count / most)}")
    for remark in found["notices"]:
        print(remark)
    print(f"row {row}, with the part that carries loss {'bright' if sys.stdout.isatty() else 'in [brackets]'}:")
    text = Text()
    for part, loss in found["example"]:
        if sys.stdout.isatty():
            text.append(part, style="bold" if loss else "dim")
        else:
            text.append(f"[{part}]" if loss else part)
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


@app.command("env")
def show_environment(as_json: Json = False) -> None:
    """Versions and machine, to paste into a bug report."""
    from smidgen.run import environment

    found = environment()
    _print(found) if as_json else print(
        "\n".join(
            [f"{k}: {v}" for k, v in found["versions"].items()] + [f"{k}: {v}" for k, v in found.items() if k != "versions"]
        )
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the report and the runs are written")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Tune the embedded model three ways, offline, and write a page that compares them (under two minutes)."""
    from smidgen.demo import demo as run_demo

    found = run_demo(output, say=(lambda line: print(line, file=sys.stderr, flush=True)) if as_json else _say)
    if as_json:
        _print(found)


def _version(value: bool) -> None:
    if value:
        print(f"smidgen {__version__}")
        raise typer.Exit


for _verb in (plan, compare, report):
    app.command()(_verb)


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run code that a run's model brings")] = False,
) -> None:
    if debug:
        os.environ["SMIDGEN_DEBUG"] = "1"
    if trust_remote_code:
        os.environ["SMIDGEN_TRUST_REMOTE_CODE"] = "1"


def main() -> None:
    """Run the command; errors of the user become one message on standard error and an exit code."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("smidgen").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import, by PEFT, it names kernels that no run uses
    try:
        app()
    except UserError as error:
        if os.environ.get("SMIDGEN_DEBUG"):
            raise
        print(f"{speaker()}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("SMIDGEN_DEBUG"):
            raise
        print(f"{speaker()}: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)
