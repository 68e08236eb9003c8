"""`method: auto` is replaced before anything is loaded: by one setting for each scheme, and said."""

from __future__ import annotations

import pytest

from smidgen import auto, optim
from smidgen.config import ConfigError
from smidgen.config_file import load
from smidgen.trainer import method_config


def resolve(**keys):
    lines: list[str] = []
    return auto.resolve(load(None, [], keys), lines.append), lines


@pytest.mark.parametrize("scheme", auto.CHOICES)
def test_every_choice_is_a_setting_of_a_method_without_gradients(scheme):
    given = {"scheme": "full", "quantise": "nf4"} if scheme == auto.VALUES else {"scheme": scheme}
    config, lines = resolve(method="auto", **given)
    method, lr, options = auto.CHOICES[scheme]
    made = method_config(config.method, None, {**config.method_args, "lr": config.train.learning_rate})
    assert (config.method, made.lr) == (method, lr) and {k: getattr(made, k) for k in options} == dict(options)
    assert optim.get(method).build.uses == {"losses"} and len(lines) == 2 + len(options)
    assert all("method auto" in line for line in lines)


def test_where_only_values_can_be_had_the_choice_is_one_that_only_compares_them():
    values = auto.CHOICES[auto.VALUES][0]
    for given in ({"quantise": "int8"}, {"reward": "module:function"}, {"objective": "f1"}):
        assert resolve(method="auto", scheme="full", **given)[0].method == values
    assert resolve(method="auto", scheme="full")[0].method != values
    assert resolve(method="auto", scheme="lora", reward="module:function")[0].method == auto.CHOICES["lora"][0]
    with pytest.raises(ConfigError, match="no choice for scheme values"):
        resolve(method="auto", scheme="values")


def test_what_the_user_says_stays():
    assert resolve(method="auto", **{"train.learning_rate": 0.5})[0].train.learning_rate == 0.5
    config, lines = resolve(method="zo_sgd", method_args={"eps": 0.5})
    assert config.method == "zo_sgd" and config.method_args == {"eps": 0.5} and not lines


def test_what_auto_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"method_args \(eps\) belongs to a method: name it"):
        resolve(method="auto", method_args={"eps": 0.5})
    with pytest.raises(ConfigError, match="a preset belongs to a method"):
        resolve(method="auto", preset="mezo")
    with pytest.raises(ConfigError, match="no choice for scheme spiel, only for full"):
        resolve(method="auto", scheme="spiel")
