"""The command as a user runs it, offline, on the embedded model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

from smidgen import cli

pytestmark = pytest.mark.trainer

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
SMALL = ["--task", "reviews", "--train-rows", "64", "--dev-rows", "32", "--batch", "8", "train.eval_steps=1000"]


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Commands run in this process, which is quick; what has to die or to start afresh runs in one of its own."""
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity)


def smidgen(*arguments, cwd, code=0, input=None):
    """Run the command in `cwd`; checks the exit code and returns stdout and stderr."""
    out, errors = io.StringIO(), io.StringIO()
    found, before, argv, stdin = 0, Path.cwd(), sys.argv, sys.stdin
    sys.argv, sys.stdin = ["smidgen", *map(str, arguments)], io.StringIO(input or "")
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as error:
        found = error.code or 0
    finally:
        os.chdir(before)
        sys.argv, sys.stdin = argv, stdin
    assert found == code, f"exit {found}, wanted {code}\n{out.getvalue()}\n{errors.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=errors.getvalue())


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "smidgen", *map(str, arguments)],
        cwd=cwd,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def wait_for_steps(process, folder: Path, steps: int) -> None:
    """Until so many records (36 bytes each) are in the journal, or a checkpoint of so many steps stands."""
    deadline = time.monotonic() + 120
    header = None
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        path = folder / "journal.bin"
        if path.exists():
            size = path.stat().st_size
            header = header or int.from_bytes(path.read_bytes()[8:12], "little") + 16
            if size >= header + 36 * steps:
                return
        elif (folder / f"checkpoint-{steps}" / "trainer_state.json").exists():
            return
        time.sleep(0.01)
    raise AssertionError("the run made no progress")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run."""
    cwd = tmp_path_factory.mktemp("straight")
    smidgen("train", *SMALL, "--steps", "40", "--lr", "1e-5", "-o", "run", cwd=cwd)
    return cwd / "run"


def test_a_run_leaves_the_files_that_it_promises(straight):
    names = {p.name for p in straight.iterdir()}
    promised = {
        "config.resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "journal.bin",
        "trainer_state.json",
        "result.json",
        "README.md",
    }
    assert promised | {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [n for n in names if n.endswith(".part") or n == ".saving"]
    found = result(straight)
    keys = (
        "status metric before dev test steps forwards backwards tokens seconds peak_bytes weights_sha256 config_sha256 versions"
    )
    assert set(keys.split()) <= set(found)
    assert found["status"] == "done" and found["steps"] == 40 and found["forwards"] == 80 and found["backwards"] == 0
    assert found["peak_bytes"] > 2_000_000
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and "before" in lines[0]
    assert yaml.safe_load((straight / "config.resolved.yaml").read_text())["train"]["max_steps"] == 40


def test_the_resolved_configuration_repeats_the_run(straight, tmp_path):
    smidgen("train", straight / "config.resolved.yaml", "output=again", cwd=tmp_path)
    assert result(tmp_path / "again")["weights_sha256"] == result(straight)["weights_sha256"]
    assert result(tmp_path / "again")["config_sha256"] == result(straight)["config_sha256"]


def test_replay_rebuilds_the_weights_and_any_step(straight, tmp_path):
    smidgen("replay", "embedded", straight, "--to", "whole", cwd=tmp_path)
    assert result(tmp_path / "whole")["weights_sha256"] == result(straight)["weights_sha256"]
    smidgen("replay", "embedded", straight, "--to", "half", "--at", 20, cwd=tmp_path)
    assert result(tmp_path / "half")["weights_sha256"] != result(straight)["weights_sha256"]
    assert result(tmp_path / "half")["steps"] == 20
    smidgen("replay", "embedded", straight, "--to", "half", cwd=tmp_path, code=2)  # nothing is overwritten
    done = smidgen("replay", "embedded", straight, "--to", "beyond", "--at", 41, cwd=tmp_path, code=2)
    assert "ends after step 40" in done.stderr and not (tmp_path / "beyond").exists()


def test_replay_refuses_another_base_and_a_damaged_journal(straight, tmp_path):
    done = smidgen("replay", straight, straight, "--to", "out", cwd=tmp_path, code=2)
    assert "another base model" in done.stderr and not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.resolved.yaml", "journal.bin"):
        (broken / name).write_bytes((straight / name).read_bytes())
    data = bytearray((broken / "journal.bin").read_bytes())
    data[-200] ^= 1
    (broken / "journal.bin").write_bytes(data)
    done = smidgen("replay", "embedded", broken, "--to", "out", cwd=tmp_path, code=1)
    assert "is damaged" in done.stderr and len(done.stderr.splitlines()) <= 3


def test_kill_9_resume_and_replay_give_three_equal_hashes(straight, tmp_path):
    command = ["train", *SMALL, "--steps", "40", "--lr", "1e-5", "-o", "run"]
    process = start(*command, cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run", random.Random(0).randrange(3, 30))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "result.json").exists()
    done = smidgen("train", "--resume", "-o", "run", cwd=tmp_path)
    assert "left no word" in done.stderr
    smidgen("replay", "embedded", "run", "--to", "rebuilt", cwd=tmp_path)
    hashes = {result(f)["weights_sha256"] for f in (straight, tmp_path / "run", tmp_path / "rebuilt")}
    assert len(hashes) == 1
    assert result(tmp_path / "run")["forwards"] == 80
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    smidgen("train", "--resume", "-o", "run", cwd=tmp_path, code=2)  # done is done


def test_kill_9_with_back_propagation_resumes_from_the_checkpoint(tmp_path):
    command = ["train", *SMALL, "--method", "adamw", "--steps", "30", "--lr", "1e-4", "train.save_steps=5", "-o"]
    smidgen(*command, "straight", cwd=tmp_path)
    process = start(*command, "run", cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run", 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    smidgen("train", "--resume", "-o", "run", cwd=tmp_path)
    assert result(tmp_path / "run")["weights_sha256"] == result(tmp_path / "straight")["weights_sha256"]
    assert result(tmp_path / "run")["backwards"] == 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_exits_75(straight, tmp_path, number):
    command = ["train", *SMALL, "--steps", "40", "--lr", "1e-5", "-o", "run"]
    process = start(*command, cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run", 4)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "nothing is lost" in errors and result(tmp_path / "run")["status"] == "interrupted"
    smidgen("train", "--resume", "-o", "run", cwd=tmp_path)
    assert result(tmp_path / "run")["weights_sha256"] == result(straight)["weights_sha256"]


def test_a_torn_tail_is_cut_on_resume(straight, tmp_path):
    command = ["train", *SMALL, "--steps", "40", "--lr", "1e-5", "-o", "run"]
    process = start(*command, cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run", 6)
    process.kill()
    process.communicate()
    path = tmp_path / "run" / "journal.bin"
    os.truncate(path, path.stat().st_size - 7)
    done = smidgen("train", "--resume", "-o", "run", cwd=tmp_path)
    assert "cut 29 bytes of a torn record" in done.stderr
    assert result(tmp_path / "run")["weights_sha256"] == result(straight)["weights_sha256"]


def test_lora_run_replays_and_exports(tmp_path):
    smidgen("train", *SMALL, "--scheme", "lora", "--steps", "6", "--lr", "1e-3", "-o", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists() and (tmp_path / "run" / "init.safetensors").exists()
    smidgen("replay", "embedded", "run", "--to", "rebuilt", cwd=tmp_path)
    assert result(tmp_path / "run")["weights_sha256"] == result(tmp_path / "rebuilt")["weights_sha256"]
    for form in ("adapter", "peft-lora", "merged"):
        done = json.loads(smidgen("export", "run", "--to", f"out-{form}", "--format", form, "--json", cwd=tmp_path).stdout)
        assert done["max_difference"] < 1e-4
    done = smidgen("export", "run", "--to", "nope", "--format", "gguf", cwd=tmp_path, code=2)
    assert "it has adapter, peft-lora, merged" in done.stderr and not (tmp_path / "nope").exists()
    dev = result(tmp_path / "run")["dev"]
    found = json.loads(smidgen("eval", "run", "--json", cwd=tmp_path).stdout)
    assert found["accuracy"] == dev["accuracy"] and abs(found["loss"] - dev["loss"]) < 1e-6


def test_full_run_exports_evaluates_and_generates(straight, tmp_path):
    done = json.loads(smidgen("export", straight, "--to", "out", "--format", "merged", "--json", cwd=tmp_path).stdout)
    assert done["loader"] == "transformers" and done["max_difference"] < 1e-5
    found = json.loads(smidgen("eval", straight, "--split", "dev", "--json", cwd=tmp_path).stdout)
    assert found["accuracy"] == result(straight)["dev"]["accuracy"]
    text = smidgen("generate", straight, "Once upon a time", "--max-new-tokens", "12", cwd=tmp_path).stdout
    assert text.startswith("Once upon a time") and len(text) > 25
    assert (
        smidgen("generate", straight, "--max-new-tokens", "3", cwd=tmp_path, input="One day\nThe cat\n").stdout.count("\n") >= 2
    )


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_model_and_a_file_are_enough(tmp_path):
    rows = [
        {"prompt": f"The {a} is", "completion": f" {b}."}
        for a in ("cat", "dog", "sun", "sky")
        for b in ("big", "red", "good", "old")
    ] * 3
    write(tmp_path / "my.jsonl", rows)
    done = smidgen("train", "--model", "embedded", "--data", "my.jsonl", "--steps", "4", cwd=tmp_path)
    run = next((tmp_path / "runs").iterdir())
    for text in ("memory: weights", "lr = ", "max_length = ", "held out", "loss: "):
        assert text in done.stdout + done.stderr, text
    assert result(run)["metric"] == "loss" and (tmp_path / "runs").name in result(run)["output"]
    dry = smidgen("train", "--data", "my.jsonl", "--dry-run", cwd=tmp_path)
    assert "max_steps: 2000" in dry.stdout and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"story number {i} was {'good' if i % 2 else 'bad'}", "label": "yes" if i % 2 else "no"} for i in range(30)],
        [
            {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"It is {i}."}]}
            for i in range(30)
        ],
        [{"text": f"Once upon a time there was a number called {i}."} for i in range(30)],
    ],
)
def test_kinds_of_data(tmp_path, rows):
    write(tmp_path / "my.jsonl", rows)
    smidgen("train", "--data", "my.jsonl", "--steps", "2", "--lr", "1e-5", "-o", "run", cwd=tmp_path)
    assert result(tmp_path / "run")["status"] == "done"


GOOD = [{"text": f"row {i}", "label": "yes" if i % 2 else "no"} for i in range(20)]


@pytest.mark.parametrize(
    "arguments,code,words",
    [
        (["--method", "zo_sdg"], 2, "did you mean 'zo_sgd'"),
        (["--scheme", "lorra"], 2, "did you mean 'lora'"),
        (["--task", "reviws"], 2, "reviews"),
        (["train.learning_rat=1"], 2, "learning_rate"),
        (["modle=x"], 2, "model"),
        (["train.max_steps=many"], 2, "max_steps"),
        (["method_args.epz=1"], 2, "eps"),
        (["--data", "missing.jsonl"], 5, "missing.jsonl"),
        (["--model", "no/such/folder/here"], 2, "no/such/folder/here"),
        (["--data", "empty.jsonl"], 5, "empty"),
        (["--data", "unlabelled.jsonl"], 5, "label"),
        (["--data", "good.jsonl", "--eval-data", "strange.jsonl"], 5, "maybe"),
        (["--data", "columns.jsonl"], 5, "foo"),
        (["--data", "broken.jsonl"], 5, "broken.jsonl:2"),
        (["--kind", "masked", "--data", "good.jsonl"], 2, "masked"),
        (["config.yaml"], 2, "config.yaml:2"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(tmp_path, arguments, code, words):
    write(tmp_path / "good.jsonl", GOOD)
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "unlabelled.jsonl", [*GOOD, {"text": "no label"}])
    write(tmp_path / "strange.jsonl", [{"text": "a", "label": "maybe"}])
    write(tmp_path / "columns.jsonl", [{"foo": 1}])
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    (tmp_path / "config.yaml").write_text("method: zo_sgd\nmodle: embedded\n")
    given = [] if any(a in ("--data", "--task") for a in arguments) else ["--task", "reviews"]
    done = smidgen("train", *given, *arguments, "--steps", "1", "-o", "run", cwd=tmp_path, code=code)
    assert words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 12
    assert not (tmp_path / "run" / "config.resolved.yaml").exists()


def test_a_refusal_after_loading_leaves_the_folder_as_it_was(straight, tmp_path):
    bad = ["train", *SMALL, "--method", "zo_block", "method_args.pattern=no_such_tensor", "--steps", "2"]
    done = smidgen(*bad, "-o", "new", cwd=tmp_path, code=2)
    assert "matches none of the" in done.stderr and not (tmp_path / "new").exists()
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    smidgen(*bad, "-o", "run", "--force", cwd=tmp_path, code=2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_refusal_is_one_line_of_a_fresh_process(tmp_path):
    process = start("train", "--task", "reviews", "--preset", "nosuch", cwd=tmp_path)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and not list(tmp_path.iterdir())
    assert errors.splitlines() == ["smidgen: zo_sgd has no preset 'nosuch'; it has: mezo"]


def test_a_model_folder_without_tokenizer_is_refused(straight, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((straight / name).read_bytes())
    done = smidgen("train", "--task", "reviews", "--model", model, "--steps", "1", cwd=tmp_path, code=2)
    assert "tokenizer" in done.stderr


def test_rows_beyond_the_context_are_cut_and_counted(tmp_path):
    rows = [{"prompt": "word " * 2000, "completion": " end"}] * 4 + [{"prompt": "short", "completion": " end"}] * 20
    write(tmp_path / "long.jsonl", rows)
    done = smidgen("train", "--data", "long.jsonl", "--steps", "1", "--batch", "2", "-o", "run", "max_length=64", cwd=tmp_path)
    assert "cut" in done.stderr or "tokens" in done.stderr
    done = smidgen("train", "--data", "long.jsonl", "--steps", "1", "-o", "other", "max_length=100000", cwd=tmp_path, code=2)
    assert "positions" in done.stderr


def test_nan_losses_end_the_run_as_diverged(tmp_path):
    command = ["--task", "reviews", "--train-rows", "40", "--dev-rows", "8", "--steps", "60", "max_bad_steps=3"]
    done = smidgen("train", *command, "--lr", "1e38", "-o", "run", cwd=tmp_path, code=4)
    assert "3 steps in a row" in done.stderr and result(tmp_path / "run")["status"] == "diverged"


def test_nothing_is_overwritten_and_one_run_a_folder(straight, tmp_path):
    before = {p.name: p.read_bytes() for p in straight.iterdir() if p.is_file()}
    done = smidgen("train", *SMALL, "--steps", "1", "-o", straight, cwd=tmp_path, code=2)
    assert "holds a run" in done.stderr
    assert before == {p.name: p.read_bytes() for p in straight.iterdir() if p.is_file()}
    process = start("train", *SMALL, "--steps", "5000", "--lr", "1e-6", "-o", "busy", cwd=tmp_path)
    wait_for_steps(process, tmp_path / "busy", 1)
    done = smidgen("train", "--resume", "-o", "busy", cwd=tmp_path, code=2)
    process.kill()
    process.communicate()
    assert "in use" in done.stderr


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    done = smidgen("train", *SMALL, "--steps", "1", "-o", "file/run", cwd=tmp_path, code=1)
    assert "cannot write" in done.stderr and (tmp_path / "file").read_text() == "x"


def test_read_verbs(tmp_path):
    assert "zo_sgd" in smidgen("methods", cwd=tmp_path).stdout
    assert "eps" in smidgen("methods", "zo_sgd", cwd=tmp_path).stdout
    assert json.loads(smidgen("methods", "adamw", "--json", cwd=tmp_path).stdout)["name"] == "adamw"
    assert "sst2" in smidgen("tasks", cwd=tmp_path).stdout
    assert "torch" in smidgen("env", cwd=tmp_path).stdout
    shown = smidgen("data", "reviews", cwd=tmp_path).stdout
    assert "carry loss" in shown and "[" in shown
    smidgen("init", cwd=tmp_path)
    assert yaml.safe_load((tmp_path / "smidgen.yaml").read_text())["model"] == "embedded"
    smidgen("init", cwd=tmp_path, code=2)
    smidgen("train", "smidgen.yaml", "task=reviews", "--dry-run", cwd=tmp_path)
    assert "smidgen" in smidgen("--version", cwd=tmp_path).stdout


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, time; t = time.perf_counter(); from smidgen.cli import app\n"
        "assert not {'torch', 'transformers', 'numba', 'datasets', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV)
    assert "export" in smidgen("--help", cwd=tmp_path).stdout
    for verb in ["demo", "train", "eval", "generate", "replay", "export", "init", "methods", "tasks", "data", "env"]:
        assert "Usage" in smidgen(verb, "--help", cwd=tmp_path).stdout
