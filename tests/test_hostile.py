"""Files from anywhere: whatever they hold, the answer is a value or one sentence, in bounded time; no code of theirs runs."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from families import make
from smidgen import config_file, journal, models
from smidgen.adapt import _peft, _sparse_file
from smidgen.config import ConfigError, RunConfig, UserError
from smidgen.folder import RESOLVED, opened
from smidgen.provenance import check_header
from smidgen.tasks._example import read_jsonl
from smidgen.untrusted import check_folder, read_header, read_tensors

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DEEP = "[" * 100_000 + "]" * 100_000


def whole(tmp_path, steps=3):
    """A journal that is whole."""
    path = tmp_path / "journal.bin"
    path.unlink(missing_ok=True)
    with journal.Writer.create(path, {"groups": 1, "method": "zo_sgd"}) as writer:
        for step in range(steps):
            writer.append([1e-3], [float(step), 2.0])
    return path


def answer(call):
    """A call's value, or None for the sentence of a UserError; anything else fails the test."""
    try:
        return call()
    except UserError as error:
        assert len(str(error)) < 2000 and str(error)
        return None


# -- journals ---------------------------------------------------------------------------------------------------------


@quick
@given(st.binary(max_size=300))
def test_any_bytes_are_a_journal_or_none(tmp_path, data):
    path = tmp_path / "journal.bin"
    path.write_bytes(data)
    answer(lambda: journal.read(path))


@quick
@given(st.data())
def test_a_journal_with_changed_bytes_is_refused_or_cut(tmp_path, data):
    """No record that was not written is ever read."""
    path = whole(tmp_path)
    good, bytes_ = journal.read(path).steps(), bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        bytes_[data.draw(st.integers(0, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes_[: data.draw(st.integers(0, len(bytes_)))])
    found = answer(lambda: journal.read(path))
    assert found is None or found.steps() == good[: len(found.steps())]


@quick
@given(JSON)
def test_a_header_of_any_form_is_refused_or_compared(tmp_path, header):
    """With a right checksum, as somebody who means harm would write it."""
    text = json.dumps(header).encode()
    path = tmp_path / "journal.bin"
    path.write_bytes(journal.MAGIC + bytes([1]) + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text)))
    found = answer(lambda: journal.read(path))
    if found is not None:
        ours = {"base_sha256": "x", "method": "zo_sgd", "tensors": {}, "noise": 1, "method_config": {"lr": 1.0}}
        with pytest.raises(ConfigError):
            check_header(
                found.header, ours | {"init_sha256": None} | dict.fromkeys(("backend", "threads", "machine", "torch")), path
            )


def test_a_deep_header_and_a_long_journal_end(tmp_path):
    path = tmp_path / "journal.bin"
    path.write_bytes(
        journal.MAGIC + bytes([1]) + struct.pack("<I", len(DEEP)) + DEEP.encode() + struct.pack("<I", zlib.crc32(DEEP.encode()))
    )
    assert answer(lambda: journal.read(path)) is None
    record = [journal.Record(i, (1e-3,), (1.0, 2.0)).encode() for i in range(100_000)]
    path = whole(tmp_path, 0)
    with path.open("ab") as file:
        file.write(b"".join(record))
    assert len(journal.read(path).steps()) == 100_000  # time in proportion to its length: seconds, not hours


# -- configurations ---------------------------------------------------------------------------------------------------


@quick
@given(
    st.text(max_size=120)
    | st.from_regex(r"(model|train|seed|data|method_args): [\[\]{}&*!<>\-\w :,'\"\n]{0,60}", fullmatch=True)
)
def test_any_text_is_a_configuration_or_none(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    found = answer(lambda: config_file.load(path))
    assert found is None or isinstance(found, RunConfig)


@quick
@given(st.dictionaries(st.sampled_from([*RunConfig.model_fields, "train.max_steps", "nothing"]), JSON, max_size=4))
def test_any_values_are_a_configuration_or_none(values):
    answer(lambda: config_file.with_values(RunConfig(), values))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "model: !!python/object/apply:os.system ['touch hacked']",
        "method_args: &x {y: *x}",
        "method_args: " + "[" * 5000,
    ],
    ids=["aliases", "python", "loop", "deep"],
)
def test_a_configuration_that_means_harm_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        config_file.load(tmp_path / "c.yaml")
    assert len(str(error.value)) < 2000
    assert not (tmp_path / "hacked").exists()


# -- rows -------------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=30) | st.just(DEEP[:3000]), max_size=5), st.binary(max_size=4))
def test_any_lines_are_rows_or_none(tmp_path, lines, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="replace") + end)
    answer(lambda: read_jsonl(path))


# -- weights and adapters ---------------------------------------------------------------------------------------------


@quick
@given(
    JSON
    | st.dictionaries(
        st.text(max_size=6),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "X"]),
                "shape": st.lists(st.integers(-2, 2**62), max_size=3),
                "data_offsets": st.lists(st.integers(-2, 2**62), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    st.integers(-9, 9),
    st.binary(max_size=40),
)
def test_a_header_describes_its_file_or_is_refused(tmp_path, header, off, body):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", max(0, len(text) + off)) + text + body
    found = answer(lambda: read_header(data, tmp_path / "x"))
    for dtype, shape, first in (found or {}).values():
        size = torch.Size(shape).numel() * {"F32": 4, "U8": 1}[dtype]
        assert 8 + len(text) + off <= first and first + size <= len(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 200_000) + DEEP.encode()]
)
def test_no_reader_of_weights_believes_a_length(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for call in (lambda: read_tensors(path), lambda: check_folder(tmp_path), lambda: models.weights_bytes(str(tmp_path))):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError):
            call()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, None])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ConfigError, match="lie beside its index"):
        check_folder(tmp_path)


@quick
@given(st.lists(st.integers(0, 255), max_size=12), st.integers(0, 6), JSON)
def test_sparse_deltas_of_any_form_fit_or_are_refused(tmp_path, code, count, about):
    save_file({"w.gaps": torch.tensor(code, dtype=torch.uint8), "w.values": torch.ones(count)}, tmp_path / "sparse.safetensors")
    fine = {"version": 1, "scheme": "spiel", "base_sha256": "b", "shapes": {"w": [4, 5]}}
    for said in (fine, fine | about if isinstance(about, dict) else about):
        (tmp_path / "sparse.json").write_text(json.dumps(said))
        found = answer(lambda: _sparse_file.load(tmp_path, "spiel", "b", {"w": (4, 5)}))
        if found is not None:
            index, values = found[0]["w"]
            assert len(index) == len(values) == count and all(0 <= i < 20 for i in index.tolist())


def test_an_adapter_is_never_a_pickle(tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "hacked"), "w")

    torch.save({"w": Harm()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    _, model = make("opt-tied")
    for call in (_peft.load_adapter, _peft.with_adapter):
        with pytest.raises(ConfigError, match="only safetensors are read, never pickles"):
            call(model, tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_code_that_a_model_brings_runs_only_for_whoever_asks(tmp_path, monkeypatch):
    """Neither a model's folder nor a run's is asked for by being opened."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.M"}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="read it, then set trust_remote_code=true"):
        models.load_model(str(tmp_path))
    (tmp_path / RESOLVED).write_text("model: embedded\ntrust_remote_code: true\n")
    monkeypatch.delenv("SMIDGEN_TRUST_REMOTE_CODE", raising=False)
    with pytest.raises(ConfigError, match="smidgen --trust-remote-code"):
        opened(tmp_path)
    monkeypatch.setenv("SMIDGEN_TRUST_REMOTE_CODE", "1")
    assert opened(tmp_path).trust_remote_code
    assert not (tmp_path / "hacked").exists()
