"""Instruction tuning: conversations of every accepted form, what of them carries loss, mixtures, packing, whole runs."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import smidgen
from smidgen import tasks
from smidgen.chat import Chat, give_form, question
from smidgen.config import ConfigError, DataError
from smidgen.config_file import load
from smidgen.encode import encode
from smidgen.inference import evaluate_folder
from smidgen.tasks import Row
from test_models import bert_masked, gpt2, llama
from texts import CHATML, byte_tokenizer

ASKED = {"role": "user", "content": "What is it?"}
TOLD = {"role": "assistant", "content": "a film"}
AGAIN = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "fine"})


def chats(*records: dict[str, Any], **options: Any) -> list[Any]:
    task = tasks.get("instruct").build(tasks.get("instruct").Config(**options))
    task.read = lambda source, split: [Row(record, f"a.jsonl:{k}") for k, record in enumerate(records, 1)]
    return task.examples("train")


def learned(chat: Chat, tokenizer: Any) -> str:
    """The text that carries loss."""
    row = encode([chat], tokenizer, "causal", 256)[0]
    return tokenizer.decode([label for label in row["labels"] if label != -100])


# -- rows


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, TOLD]},
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a film"}]},
        {"prompt": "What is it?", "completion": "a film"},
        {"prompt": [ASKED], "completion": [TOLD]},
        {"instruction": "What is it?", "input": "", "output": "a film"},
        {"instruction": "What is it?", "context": None, "response": "a film"},
    ],
)
def test_every_form_becomes_the_same_conversation(record):
    (chat,) = chats(record)
    assert chat.messages == (ASKED, TOLD) and chat.place == "a.jsonl:1" and chat.cut == "right"


def test_an_input_follows_its_instruction():
    assert chats({"instruction": "Add.", "input": "1 2", "output": 3})[0].messages[0]["content"] == "Add.\n\n1 2"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "Add."}, "a conversation needs messages | conversations"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference pairs are --task preference"),
        (
            {"prompt": "p", "completion": " \n"},
            "an answer is empty: remove the row, or leave such rows out with task_args.empty=skip",
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}, *AGAIN]}, "an answer is empty"),
        ({"messages": [ASKED]}, "no turn of the assistant to learn from (roles: user)"),
        ({"messages": [TOLD]}, "nobody asks before the assistant answers"),
        ({"prompt": "p", "completion": ["a"]}, "it needs 'role' and 'content', both text"),
    ],
)
def test_bad_rows(record, message):
    with pytest.raises(DataError) as caught:
        chats(record)
    assert str(caught.value).startswith("a.jsonl:1: ") and message in str(caught.value)


def test_empty_answers_may_be_left_out(capsys):
    bad = {"instruction": "Add.", "output": ""}
    assert len(chats({"instruction": "Add.", "output": "3"}, bad, empty="skip")) == 1
    assert "1 of 2 rows with an empty answer are left out, the first is a.jsonl:2" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"a.jsonl:1: an answer is empty \(and 1 more\)"):
        chats(bad, bad, empty="skip")
    assert len(chats({"messages": [ASKED, {"role": "assistant", "content": ""}, *AGAIN]}, turns="last")) == 1


# -- what carries loss


@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_assistants_turns_carry_loss(turns):
    tokenizer = byte_tokenizer(chat=CHATML)
    (chat,) = chats({"messages": [ASKED, TOLD, *AGAIN]}, turns=turns)
    assert learned(chat, tokenizer) == ("a film<|im_end|>" if turns == "all" else "") + "fine<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
def test_forms_of_ours(bos):
    tokenizer = byte_tokenizer(bos=bos)
    (chat,) = chats({"messages": [ASKED, TOLD, *AGAIN]})
    for style, first, prompt in (
        ("tulu", "a film</s>fine</s>", "<|user|>\nWhat is it?\n<|assistant|>\n"),
        ("vicuna", " a film</s> fine</s>", "user's questions. USER: What is it? ASSISTANT:"),
    ):
        give_form(tokenizer, style)
        assert learned(chat, tokenizer) == first
        asked = question(Chat((ASKED, TOLD), "x"), tokenizer)[0]
        assert asked.endswith(prompt) and asked.startswith("<s>") == bos


def test_a_conversation_that_is_too_long_loses_its_end():
    tokenizer = byte_tokenizer(chat=CHATML)
    (chat,) = chats({"messages": [ASKED, TOLD, *AGAIN]})
    whole = encode([chat], tokenizer, "causal", 256)
    limit = whole.lengths[0] - 2
    cut = encode([chat], tokenizer, "causal", limit)
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:limit] and "the right is cut" in cut.notices[0]
    with pytest.raises(DataError, match="without room for an answer, left out"):
        encode([chat], tokenizer, "causal", 8)


# -- whole runs

ROWS = [{"instruction": f"Say {k} of {k % 7}", "output": f"the film was {k % 5}"} for k in range(40)]


def write(path: Any, records: Any) -> Any:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tune(folder: Any, **options: Any) -> dict[str, Any]:
    values = {"task": "instruct", "chat": "tulu", "train.max_steps": 4, "train.learning_rate": 1e-2, "output": str(folder)}
    return smidgen.finetune(load(None, [], {**values, **options}), say=lambda line: None)


@pytest.mark.trainer
@pytest.mark.parametrize(
    ("build", "method", "scheme", "packing"),
    [
        (llama, "sparse_adamw", "spiel", True),
        (llama, "zo_sgd", "full", False),
        (gpt2, "adamw", "lora", False),
        (gpt2, "forward_grad", "lora", True),
    ],
)
def test_methods_and_schemes_on_a_mixture(tmp_path, build, method, scheme, packing):
    model = str(build(tmp_path / "model"))
    data = [
        {"path": str(write(tmp_path / "a.jsonl", ROWS)), "weight": 0.5},
        str(write(tmp_path / "b.jsonl", [{"messages": [ASKED, TOLD, *AGAIN]}, {"prompt": "p", "completion": "c"}])),
    ]
    scheme_args = {"scheme_args": {"density": 0.1}} if scheme == "spiel" else {}
    found = tune(
        tmp_path / "run", model=model, data=data, method=method, scheme=scheme, packing=packing, max_length=64, **scheme_args
    )
    assert found["metric"] == "loss" and found["objective"] == "answer" and found["dev"]["loss"] != found["before"]["loss"]
    if method.endswith("adamw"):
        assert found["dev"]["loss"] < found["before"]["loss"]
    again = evaluate_folder(str(tmp_path / "run"), task=None, data=None, split="dev", batch_size=None)
    assert abs(again["loss"] - found["dev"]["loss"]) < 1e-5  # the form is the run's, also where the base has no template
    assert "<|assistant|>" in (tmp_path / "run" / "chat_template.jinja").read_text()


@pytest.mark.trainer
def test_a_packed_mixture_resumes_with_the_same_bits(tmp_path):
    data = [{"path": str(write(tmp_path / "a.jsonl", ROWS)), "weight": 1.5}, str(write(tmp_path / "b.jsonl", ROWS[:4]))]
    common = {"model": str(llama(tmp_path / "model")), "data": data, "packing": True, "method": "zo_sgd", "max_length": 64}
    folder = tmp_path / "run"
    straight = tune(folder, **common)
    transcript = (folder / "journal.bin").read_bytes()
    (folder / "result.json").unlink()
    (folder / "journal.bin").write_bytes(transcript[:-130])  # without the end mark and two of the four steps
    resumed = smidgen.finetune(load(None, [], {"output": str(folder), "resume": True}), say=lambda line: None)
    assert resumed["weights_sha256"] == straight["weights_sha256"]


def refused(**options: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        smidgen.finetune(load(None, [], {"task": "instruct", "train.max_steps": 1, **options}), say=lambda line: None)
    return str(caught.value)


@pytest.mark.trainer
def test_runs_that_are_refused(tmp_path):
    data = str(write(tmp_path / "a.jsonl", ROWS))
    plain, encoder = str(llama(tmp_path / "plain")), str(bert_masked(tmp_path / "encoder"))
    out = {"output": str(tmp_path / "run"), "data": data}
    assert "has no chat template: use an instruction-tuned model, name a form (chat=tulu" in refused(model=plain, **out)
    assert "a model of kind masked (an encoder) does not write" in refused(model=encoder, **out)
    assert "without room for an answer, left out" in refused(model=plain, chat="tulu", max_length=4, **out)
    assert "max_length 4000 is above the model's" in refused(model=plain, chat="tulu", max_length=4000, **out)
    packed = {**out, "packing": True, "chat": "tulu", "model": plain}
    assert "virtual tokens of scheme prompt" in refused(scheme="prompt", **packed)
    assert "packing is for answers of causal models" in refused(objective="f1", **packed)
    assert "the task 'instruct' has no rows of its own: give --data FILE" in refused(model=plain)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", [0, -1])
def test_weights_of_a_mixture_are_positive(weight):
    with pytest.raises(ConfigError, match="a weight is above 0"):
        load(None, [f"data=[{{path: a.jsonl, weight: {weight}}}, b.jsonl]"])


def test_a_weighted_list_on_the_command_line():
    config = load(None, [], {"data": "[{path: a.jsonl, weight: 2}, b.jsonl]"})
    assert [getattr(source, "weight", 1.0) for source in config.data or ()] == [2.0, 1.0]


def test_the_recipe_of_the_guide_is_a_configuration(tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "instruction_tuning.md").read_text()
    block = guide.partition("    # llama2.yaml\n")[2].partition("\n\n")[0]
    (tmp_path / "llama2.yaml").write_text(textwrap.dedent(block))
    commands = re.findall(r"smidgen train llama2.yaml ((?:.|\\\n)*?) -o", guide)
    assert len(commands) == 2
    for command in commands:
        words = command.replace("\\\n", " ").replace("--lr ", "train.learning_rate=").split()
        config = load(tmp_path / "llama2.yaml", words)
        assert config.method_args == {"weight_decay": 30} and config.train.gradient_accumulation_steps == 128
        assert config.chat == "tulu" and config.data in guide
