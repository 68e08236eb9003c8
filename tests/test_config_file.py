"""Configuration files: order of sources, coercion, aliases, errors that name the place, YAML that loads back equal."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.config import ConfigError, RunConfig, Source, options
from smidgen.config_file import FLAGS, config_sha256, dump, load, template, with_values


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def refuse(path: Path | None = None, overrides: list[str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides or [], flags)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_are_those_of_the_table():
    config = load()
    assert config == RunConfig()
    assert (config.model, config.method, config.scheme, config.seed, config.max_bad_steps) == (
        "embedded",
        "zo_sgd",
        "full",
        0,
        20,
    )
    assert config.train.per_device_train_batch_size == 16
    assert config.train.learning_rate is None and config.train.max_steps is None


def test_file_then_flags_then_overrides(tmp_path):
    path = write(tmp_path, "seed: 1\nmodel: gpt2\ntrain:\n  max_steps: 5\n  logging_steps: 2\n")
    config = load(path, ["train.max_steps=9"], {"seed": 2, "steps": 7, "model": None})
    assert (config.seed, config.model, config.train.max_steps, config.train.logging_steps) == (2, "gpt2", 9, 2)


def test_short_flags_are_aliases_of_keys():
    config = load(flags={"steps": 3, "lr": 1e-3, "batch": 4, "eps": 0.01, "max-length": 64})
    assert (config.train.max_steps, config.train.learning_rate, config.train.per_device_train_batch_size) == (3, 1e-3, 4)
    assert config.method_args == {"eps": 0.01} and config.max_length == 64


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", "1E-4", "+1e-4"])
def test_learning_rate_spellings(tmp_path, text):
    path = write(tmp_path, f"train:\n  learning_rate: {text}\nmethod_args:\n  eps: 1e-3\n")
    config = load(path)
    assert config.train.learning_rate == 1e-4
    assert config.method_args == {"eps": 1e-3}
    assert load(None, [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


def test_yaml_words_stay_words(tmp_path):
    path = write(tmp_path, "words: [no, yes]\noutput: 2024-01-01\ntrain:\n  push_to_hub: no\n")
    config = load(path)
    assert config.words == ["no", "yes"] and config.output == "2024-01-01" and config.train.push_to_hub is False
    assert load(None, ["words=[0, 1]"]).words == ["0", "1"]


def test_sections_merge_key_by_key(tmp_path):
    path = write(tmp_path, "method_args: {eps: 1, queries: 4}\n")
    assert load(path, ["method_args.eps=2"]).method_args == {"eps": 2, "queries": 4}
    assert load(path, ["method_args={}"]).method_args == {}
    assert load(write(tmp_path, "train:\nmethod_args:\n")) == RunConfig()


def test_unknown_training_names_are_kept_for_the_trainer(tmp_path):
    config = load(write(tmp_path, "train:\n  adam_beta1: 0.8\n  lr_scheduler_kwargs: {min_lr: 1e-6}\n"))
    assert config.train.extra == {"adam_beta1": 0.8, "lr_scheduler_kwargs": {"min_lr": 1e-6}}


def test_names_of_other_tools_are_read_with_a_notice(tmp_path):
    path = write(
        tmp_path,
        """\
        base_model: gpt2
        dataset_name: owner/set
        cutoff_len: 128
        micro_batch_size: 2
        learning_rate: 1e-5
        warmup_ratio: 0.1
        optim: adamw_torch
        lora_r: 4
        train:
          seed: 7
          max_steps: -1
        """,
    )
    lines: list[str] = []
    config = load(path, notify=lines.append)
    assert (config.model, config.data, config.max_length, config.seed) == ("gpt2", "owner/set", 128, 7)
    assert (config.train.per_device_train_batch_size, config.train.learning_rate, config.train.warmup_steps) == (2, 1e-5, 0.1)
    assert config.train.extra == {"optim": "adamw_torch"} and config.train.max_steps is None
    assert config.scheme == "lora" and config.scheme_args == {"rank": 4}
    assert len(lines) == 9
    assert lines[0] == f"{path}:1: 'base_model' is read as 'model'"


def test_flags_with_training_names_need_no_notice():
    lines: list[str] = []
    config = load(None, ["learning_rate=1e-3"], {"num-train-epochs": 2}, notify=lines.append)
    assert config.train.learning_rate == 1e-3 and config.train.num_train_epochs == 2 and not lines


def test_scheme_of_lora_aliases_can_be_overridden(tmp_path):
    assert load(write(tmp_path, "lora_r: 4\nscheme: full\n"), notify=lambda line: None).scheme == "full"


def test_alias_and_key_together_are_refused(tmp_path):
    assert "keep one" in refuse(write(tmp_path, "model: a\nmodel_name_or_path: b\n"))


def test_unknown_key_names_file_line_and_nearest(tmp_path):
    path = write(tmp_path, "model: gpt2\n\nmetod: adamw\n")
    assert refuse(path) == f"{path}:3: unknown key 'metod': did you mean 'method'?"
    assert "'train.learning_rate'" in refuse(None, ["learnin_rate=1"])
    assert "did you mean 'scheme'" in refuse(shceme="lora")
    assert "--help" in refuse(None, ["zzz=1"])
    assert "unknown key 'model.name'" in refuse(None, ["model.name=x"])


def test_wrong_type_names_value_place_and_type(tmp_path):
    path = write(tmp_path, "train:\n  max_steps: many\n")
    assert refuse(path) == f"{path}:2: train.max_steps = 'many': expected a whole number"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=true", "expected a whole number"),
        ("seed=1.5", "expected a whole number"),
        ("seed=-1", "expected a whole number at least 0"),
        ("seed=18446744073709551616", "expected a whole number below 18446744073709551616"),
        ("train.learning_rate=fast", "expected a number"),
        ("train.learning_rate=.nan", "expected a number"),
        ("train.learning_rate=true", "expected a number"),
        ("dtype=fp8", "expected one of auto, float32, bfloat16, float16"),
        ("resume=2", "expected true or false"),
        ("model=7", "expected text"),
        ("train=3", "expected a section"),
        ("method_args=3", "expected a section"),
        ("words=[one]", "expected a list of text with at least 2 entries"),
        ("words=[true, false]", "expected a list of text"),
        ("data={path: a}", "expected text or a list of text or {path, weight}"),
        ("data=[{file: a}]", "expected text or a list of text or {path, weight}"),
        ("data=[{path: a, weight: 0}]", "data"),
        ("train.per_device_train_batch_size=0", "expected a whole number at least 1"),
    ],
)
def test_values_of_the_wrong_type(override, message):
    assert message in refuse(None, [override])
    assert f"'{override}'" in refuse(None, [override])


def test_all_wrong_values_are_told_at_once():
    assert refuse(None, ["seed=a", "train.max_steps=b"]).count("\n") == 1


def test_malformed_files(tmp_path):
    assert "no configuration file" in refuse(tmp_path / "absent.yaml")
    write(tmp_path, "model: a\n")
    assert f"did you mean '{tmp_path / 'run.yaml'}'" in refuse(tmp_path / "runn.yaml")
    assert "config.resolved.yaml" in refuse(tmp_path)
    assert ":2: not valid YAML" in refuse(write(tmp_path, "model: a\n  seed: [1\n"))
    assert "'key: value'" in refuse(write(tmp_path, "- a\n- b\n"))
    assert ":3: 'seed' is already given in line 1" in refuse(write(tmp_path, "seed: 1\nmodel: a\nseed: 2\n"))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: caf\xe9\n")
    assert "not valid YAML" in refuse(path)
    path.write_text("!!python/object/apply:os.system ['false']\n")
    assert "not valid YAML" in refuse(path)
    assert load(write(tmp_path, "")) == RunConfig()


def test_overrides_need_an_equals_sign():
    assert "key=value" in refuse(None, ["seed"])
    assert load(None, ["--seed=3", "output="]).seed == 3


def test_data_is_a_path_or_a_weighted_list():
    assert load(None, ["data=a.jsonl"]).data == "a.jsonl"
    config = load(None, ["data=[a.jsonl, {path: b, weight: 0.5}]"])
    assert config.data == ["a.jsonl", Source(path="b", weight=0.5)]


def test_dump_loads_back_equal(tmp_path):
    config = load(
        None,
        [
            "data=[a, {path: b, weight: 0.5}]",
            "words=['no', '1e-4', 'true', '~', ' x', '0x1', '1:30']",
            "train.adam_beta1=0.8",
            "train.learning_rate=1e-7",
            "method_args={eps: 1e-3, list: [1, a]}",
            'template="{text}\\nLabel: {answer}"',
            "seed=18446744073709551615",
        ],
    )
    path = write(tmp_path, dump(config))
    assert load(path) == config
    assert config_sha256(load(path)) == config_sha256(config)
    assert yaml.safe_load(dump(config))["train"]["adam_beta1"] == 0.8  # other tools read the same file


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12))
def test_any_text_survives_the_dump(tmp_path_factory, text):
    config = RunConfig(template=text, method_args={"a": text})
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_config_hash_is_of_what_is_computed():
    base = load(None, ["seed=1"])
    assert config_sha256(base) == config_sha256(load(None, ["seed=1", "output=x", "resume=true", "force=true"]))
    assert config_sha256(base) != config_sha256(load(None, ["seed=2"]))
    assert config_sha256(base) != config_sha256(load(None, ["seed=1", "train.adam_beta1=0.8"]))


def test_with_values_validates():
    config = load(None, ["method_args.eps=1", "train.adam_beta1=0.8", "data=[{path: a}]"])
    changed = with_values(config, {"train.learning_rate": "1e-3", "method_args.eps": 2, "seed": 5})
    assert changed.train.learning_rate == 1e-3 and changed.method_args == {"eps": 2} and changed.seed == 5
    assert changed.train.extra == {"adam_beta1": 0.8} and changed.data == config.data
    assert with_values(config, {}) == config
    assert with_values(config, {"method_args": {"queries": 2}}).method_args == {"queries": 2}
    assert with_values(config, {"method_args": {}}).method_args == {}
    with pytest.raises(ConfigError, match="seed"):
        with_values(config, {"seed": "x"})


def test_the_template_is_the_defaults_with_every_key_explained(tmp_path):
    text = template()
    config = load(write(tmp_path, text))
    assert config == RunConfig() and config_sha256(config) == config_sha256(RunConfig())
    lines = text.splitlines()
    for option in options():
        section, _, key = option.key.rpartition(".")
        indent = "  " if section else ""
        (place,) = [i for i, line in enumerate(lines) if line.removeprefix(indent).lstrip("#").startswith(f"{key}:")]
        assert lines[place].startswith(indent) and lines[place - 1].startswith(f"{indent}# {option.help}")
        assert lines[place].startswith(f"{indent}#") == (option.default is None)
        given_keys = (config.train if section else config).model_fields_set
        assert (key in given_keys) == (option.default is not None)  # what is commented out counts as not given
    assert load(write(tmp_path, uncommented(text))) == RunConfig()


def uncommented(text: str) -> str:
    """The template with every key in force."""
    return "\n".join(line if line.lstrip().startswith("# ") else line.replace("#", "", 1) for line in text.splitlines())


def test_short_flags_name_keys():
    assert set(FLAGS.values()) <= {option.key for option in options()} | {"method_args.eps"}


def test_importing_it_is_light():
    code = (
        "import sys, smidgen.config_file as c; c.load(None, ['seed=1']); "
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
