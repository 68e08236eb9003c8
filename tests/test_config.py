"""RunConfig: every key once and explained, its JSON schema, the nearest name, and exit codes."""

from __future__ import annotations

from smidgen import config as configuration
from smidgen.config import RunConfig, TrainConfig, nearest


def test_every_key_is_documented_once():
    for option in configuration.options():
        assert option.help and len(option.help) < 110, option.key
    keys = [option.key for option in configuration.options()]
    assert len(keys) == len(set(keys)) == len(RunConfig.model_fields) - 1 + len(TrainConfig.model_fields) - 1


def test_json_schema_covers_the_keys():
    schema = configuration.json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields) and schema["additionalProperties"] is False
    train = schema["$defs"]["TrainConfig"]
    assert train["additionalProperties"] is True and "extra" not in train["properties"]


def test_nearest():
    assert nearest("adamv", ["adamw", "sgd"]) == "adamw"
    assert nearest("learning_rte", ["train.learning_rate"]) == "train.learning_rate"
    assert nearest("q", ["adamw", "sgd"]) is None


def test_exit_codes():
    codes = {"ConfigError": 2, "MemoryRefused": 3, "Diverged": 4, "DataError": 5, "Interrupted": 75, "UserError": 1}
    for name, code in codes.items():
        assert getattr(configuration, name)("x").exit_code == code
    assert configuration.UserError("x", 9).exit_code == 9
