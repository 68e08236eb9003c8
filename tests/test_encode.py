"""Encoding: labels, cuts and choices for every kind, options, prompts, conversations, and what is shown of a row."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.chat import Chat, as_turn
from smidgen.config import ConfigError, DataError
from smidgen.encode import choose_max_length, describe, encode, encode_options, encode_prompts
from smidgen.tasks import Example
from texts import CHATML, CORPUS, byte_tokenizer, labelled, sentence_tokenizer, shared, word_tokenizer


def answer_of(row: dict[str, Any], tokenizer: Any) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


# -- causal


@pytest.mark.parametrize("bos", [False, True])
def test_only_the_answer_carries_loss(bos):
    tokenizer = byte_tokenizer(bos=bos)
    examples = [Example("What is the film", " a story of one day"), Example("", "the film was"), labelled("the film", 1)]
    encoded = encode(examples, tokenizer, "causal", 64)
    for example, row in zip(examples, encoded, strict=True):
        text = example.prompt + example.answer
        expected = tokenizer(text)["input_ids"] + ([] if example.options else [tokenizer.eos_token_id])
        assert row["input_ids"] == expected and len(row["labels"]) == len(expected)
        assert all(label in (-100, token) for label, token in zip(row["labels"], expected, strict=True))
    assert answer_of(encoded[0], tokenizer) == " a story of one day</s>"
    assert answer_of(encoded[2], tokenizer) == " great"
    whole = tokenizer.decode(encoded[1]["input_ids"], skip_special_tokens=True)
    assert whole == "the film was"
    assert encoded[1]["labels"].count(-100) == 1  # the first token, or <s>: nothing comes before it
    assert encoded[1]["labels"][0] == -100


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab é\n.漢"), max_size=12).map(str.rstrip),
    st.text(st.sampled_from("ab é\n.漢"), min_size=1, max_size=12),
)
def test_labels_are_the_tokens_that_end_in_the_answer(prompt, answer):
    tokenizer = byte_tokenizer()
    if not answer.strip():
        return
    row = encode([Example(prompt, answer)], tokenizer, "causal", 256)[0]
    end, boundary, expected = 0, len(prompt.encode()), []
    for token in row["input_ids"][:-1]:  # twin: a byte-level token has one letter for every byte it covers
        end += len(tokenizer.convert_ids_to_tokens(token))
        expected.append(token if end > boundary else -100)
    assert end == len((prompt + answer).encode())
    assert row["labels"] == [-100, *expected[1:], tokenizer.eos_token_id]


def test_choices_of_single_token_words():
    tokenizer = byte_tokenizer()
    encoded = encode([labelled("the film was", 0), labelled("a story of It", 1)], tokenizer, "causal", 32)
    ids = tuple(tokenizer(" " + word)["input_ids"][0] for word in ("terrible", "great"))
    assert encoded.choices == ids
    assert [row["labels"][-1] for row in encoded] == [ids[0], ids[1]]


def test_words_of_several_tokens_have_no_choices():
    tokenizer = byte_tokenizer()
    encoded = encode([labelled("the film was", 1, ("xyzzy", "plugh"))], tokenizer, "causal", 32)
    assert encoded.choices is None and answer_of(encoded[0], tokenizer) == " plugh"
    half = encode([labelled("the film was", 1, ("xyzzy", "great"))], tokenizer, "causal", 32)
    assert half.choices is None and not half.notices
    mixed = encode([labelled("a", 1), labelled("a", 0, ("good", "bad"))], tokenizer, "causal", 32)
    assert mixed.choices is None


def test_truncation_keeps_start_token_and_answer():
    tokenizer = byte_tokenizer(bos=True)
    example = labelled("the film was fine . a story of one day and", 1)
    full = encode([example], tokenizer, "causal", 64)[0]["input_ids"]
    encoded = encode([example], tokenizer, "causal", 6)
    assert encoded[0]["input_ids"] == [full[0], *full[-5:]] and answer_of(encoded[0], tokenizer) == " great"
    assert encoded.notices == ["1 of 1 rows: longer than 6 tokens, the left of the prompt is cut"]
    long = encode([Example("What is", " the film was fine . a story of one day")], tokenizer, "causal", 5)
    assert answer_of(long[0], tokenizer) == " the film was fine"
    assert long.notices[1] == "1 of 1 rows: an answer is longer than 5 tokens, its right is cut"
    bare = encode([Example("What is", " the film was fine .")], byte_tokenizer(), "causal", 4)
    assert answer_of(bare[0], tokenizer) == " the film was" and bare[0]["labels"][0] == -100


@pytest.mark.parametrize("bos", [False, True])
def test_long_texts_are_cut_into_blocks(bos):
    tokenizer = byte_tokenizer(bos=bos)
    text = " ".join(CORPUS[:5])
    encoded = encode([Example("", text)], tokenizer, "causal", 16)
    assert len(encoded) > 1 and encoded.index == [0] * len(encoded) and max(encoded.lengths) == 16
    labels = [label for row in encoded for label in row["labels"] if label != -100]
    whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert labels == (whole if bos else whole[1:])  # every token once
    assert "cut into blocks" in encoded.notices[0]


def test_length_is_chosen_and_capped():
    assert choose_max_length(range(1, 101), None) == 95
    assert choose_max_length(range(1, 101), 64) == 64
    assert choose_max_length([5000] * 3, None) == choose_max_length([5000] * 3, 4096) == 1024
    assert choose_max_length([7], 512) == 7
    tokenizer = byte_tokenizer()
    assert encode([labelled("the film was", 1)] * 3, tokenizer, "causal").max_length == 4
    assert encode([labelled("the film was", 1)], tokenizer, "causal", None, context=3).max_length == 3
    with pytest.raises(ConfigError, match="max_length 99 is above the model's 64 positions"):
        encode([labelled("the film was", 1)], tokenizer, "causal", 99, context=64)


def test_rows_without_answer_are_left_out_and_counted():
    tokenizer = byte_tokenizer()
    encoded = encode([Example("a", " "), Example("a", " b")], tokenizer, "causal", 16)
    assert len(encoded) == 1 and encoded.index == [1]
    assert encoded.notices == ["1 of 2 rows: no answer to learn from, left out"]
    with pytest.raises(DataError, match="none of the 1 rows has a token to learn from"):
        encode([Example("a", "")], tokenizer, "causal", 16)
    with pytest.raises(DataError, match="empty"):
        encode([], tokenizer, "causal", 16)
    with pytest.raises(ConfigError, match="nothing before its"):
        encode([labelled("", 1)], tokenizer, "causal", 16)
    with pytest.raises(ConfigError, match="unknown kind"):
        encode([Example("a", " b")], tokenizer, "causl", 16)


# -- masked, seq2seq, classification


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(framed=True), word_tokenizer()], ids=["roberta", "bert"])
def test_masked_rows(tokenizer):
    encoded = encode([labelled("the film was", 1), labelled("a story . It was", 0)], tokenizer, "masked", 32)
    for row, text in zip(encoded, ["the film was great.", "a story . It was terrible."], strict=True):
        whole = tokenizer(text)["input_ids"]
        (where,) = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert row["input_ids"][where] == tokenizer.mask_token_id and row["input_ids"].count(tokenizer.mask_token_id) == 1
        assert row["labels"][where] == whole[where]
        assert [*row["input_ids"][:where], whole[where], *row["input_ids"][where + 1 :]] == whole
        assert row["labels"][where] in encoded.choices


def test_masked_truncation_keeps_mask_and_frame():
    tokenizer = word_tokenizer()
    encoded = encode([labelled("the film was fine a story of one day", 1)], tokenizer, "masked", 6)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] one day [MASK]. [SEP]"
    wide = labelled("one day", 1, suffix=" the film was fine a story")
    assert tokenizer.decode(encode([wide], tokenizer, "masked", 5)[0]["input_ids"]) == "[CLS] [MASK] the film [SEP]"


def test_masked_words_must_be_one_token():
    tokenizer = word_tokenizer()
    with pytest.raises(DataError, match=r"label word 'xyzzy' is 1 tokens here \(\[UNK\]\)"):
        encode([labelled("the film was", 0, ("xyzzy", "great"))], tokenizer, "masked", 32)
    with pytest.raises(DataError, match=r"label word 'goodbad' is \d+ tokens here \(good ##.*--kind classification"):
        encode([labelled("the film was", 0, ("goodbad", "great"))], tokenizer, "masked", 32)
    with pytest.raises(DataError, match="needs labelled rows"):
        encode([Example("a", " b")], tokenizer, "masked", 32)
    with pytest.raises(DataError, match="same token"):
        encode([labelled("the film was", 0, ("great", "Great"))], tokenizer, "masked", 32)
    with pytest.raises(ConfigError, match="no mask token"):
        encode([labelled("the film was", 0)], sentence_tokenizer(), "masked", 32)


def test_seq2seq_rows():
    tokenizer = sentence_tokenizer()
    encoded = encode([labelled("the film was", 1), Example("What is", " a story")], tokenizer, "seq2seq", 32)
    assert encoded[0]["input_ids"] == tokenizer("the film was")["input_ids"]
    assert encoded[0]["labels"] == tokenizer("great")["input_ids"] and encoded[0]["labels"][-1] == tokenizer.eos_token_id
    cut = encode([Example("the film was fine", " a story of one day")], tokenizer, "seq2seq", 3)
    assert cut[0]["input_ids"] == tokenizer("the film was fine")["input_ids"][-3:] and len(cut[0]["labels"]) == 3
    assert len(cut.notices) == 2
    with pytest.raises(DataError, match="a seq2seq model needs one"):
        encode([Example("", "a text")], tokenizer, "seq2seq", 16)


def test_classification_rows():
    tokenizer = word_tokenizer()
    single = encode([labelled("the film was fine", 1)], tokenizer, "classification", 5)
    assert single[0] == {"input_ids": tokenizer("the film was")["input_ids"], "labels": 1, "token_type_ids": [0] * 5}
    assert single.notices == ["1 of 1 rows: longer than 5 tokens, cut at the end"]
    pair = Example("p", " a", options=(" a", " b"), gold=0, text=("the film", "was fine"))
    row = encode([pair], tokenizer, "classification", 32)[0]
    assert row["input_ids"] == tokenizer("the film", "was fine")["input_ids"] and row["token_type_ids"][-1] == 1
    with pytest.raises(DataError, match="needs labelled rows"):
        encode([Example("a", " b")], tokenizer, "classification", 32)


# -- options and prompts


def test_options_share_their_prompt():
    tokenizer = byte_tokenizer(bos=True)
    words = ("great", "terrible story of xyzzy", "bad")
    examples = [labelled("the film was fine . a story of one day and", 1, words), labelled("It was", 0, words)]
    encoded = encode_options(examples, tokenizer, "causal", 12)
    assert encoded.index == [0, 0, 0, 1, 1, 1] and encoded.option == [0, 1, 2, 0, 1, 2]
    for position, row in enumerate(encoded):
        assert answer_of(row, tokenizer) == " " + words[encoded.option[position]]
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        first = encoded[position - encoded.option[position]]
        assert row["input_ids"][:start] == first["input_ids"][:start] and len(row["input_ids"]) <= 12
    seq2seq = encode_options(examples, sentence_tokenizer(), "seq2seq", 32)
    assert seq2seq[0]["input_ids"] == seq2seq[1]["input_ids"] and seq2seq[0]["labels"] != seq2seq[1]["labels"]
    with pytest.raises(ValueError, match="scores all options at once"):
        encode_options(examples, tokenizer, "masked", 12)
    with pytest.raises(DataError, match="no options"):
        encode_options([Example("a", " b")], tokenizer, "causal", 12)


def test_prompts_for_generation():
    tokenizer = byte_tokenizer(bos=True, chat=CHATML)
    chat = Chat(({"role": "user", "content": "What is"}, {"role": "assistant", "content": "a film"}), "mem:1")
    encoded = encode_prompts([Example("the film", " was"), chat], tokenizer, "causal")
    assert tokenizer.decode(encoded[0]["input_ids"]) == "<s>the film"
    assert tokenizer.decode(encoded[1]["input_ids"]) == "<|im_start|>user\nWhat is<|im_end|>\n<|im_start|>assistant\n"
    cut = encode_prompts([Example("the film was", " fine")], tokenizer, "causal", 3)
    assert tokenizer.decode(cut[0]["input_ids"]) == "<s> film was"
    assert encode_prompts([Example("the film", " was")], sentence_tokenizer(), "seq2seq")[0]["input_ids"][-1] == 1
    with pytest.raises(DataError, match="no prompt to continue"):
        encode_prompts([Example("", "x")], byte_tokenizer(), "causal")


# -- chat


TURNS = (
    {"role": "user", "content": "What is"},
    {"role": "assistant", "content": "a film"},
    {"role": "user", "content": "one day"},
    {"role": "assistant", "content": "a story"},
)


def test_every_assistant_turn_carries_loss():
    tokenizer = byte_tokenizer(chat=CHATML)
    encoded = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 128)
    (row,) = encoded
    assert answer_of(row, tokenizer) == "a film<|im_end|>a story<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(list(TURNS), tokenize=False).rstrip()
    assert not encoded.notices


def test_a_template_without_end_token_gets_one():
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = byte_tokenizer(chat=plain)
    (row,) = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 128)
    assert answer_of(row, tokenizer) == " a film\n a story\n</s>"
    (open_end,) = encode([Chat(TURNS[:3], "mem:1")], tokenizer, "causal", 128)
    assert answer_of(open_end, tokenizer) == " a film\n"


def test_a_template_that_rewrites_earlier_turns_gives_rows_of_their_own():
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}fine {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_tokenizer(chat=thinking)
    encoded = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 128)
    assert [answer_of(row, tokenizer) for row in encoded] == ["fine a film<|im_end|>", "fine a story<|im_end|>"]
    assert encoded.index == [0, 0] and "row of its own" in encoded.notices[0]


def test_a_tokenizer_without_end_token_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    encoded = encode([Example("the film", " was")], tokenizer, "causal", 16)
    assert answer_of(encoded[0], tokenizer) == " was" and "no end token" in encoded.notices[0]


def test_chat_truncation_keeps_the_last_answer():
    tokenizer = byte_tokenizer(chat=CHATML)
    (row,) = encode([Chat(TURNS, "mem:1")], tokenizer, "causal", 8)
    assert len(row["input_ids"]) == 8 and answer_of(row, tokenizer) == "a story<|im_end|>"


def test_chat_errors():
    with pytest.raises(DataError, match=r"mem:1: .*no chat template: use an instruction-tuned model"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(), "causal", 64)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation: roles must alternate"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(chat=refusing), "causal", 64)
    no_opening = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    with pytest.raises(DataError, match="does not open the assistant's turn"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(chat=no_opening), "causal", 64)
    with pytest.raises(DataError, match="none of the 1 rows"):
        encode([Chat(TURNS[:1], "mem:1")], byte_tokenizer(chat=CHATML), "causal", 64)
    with pytest.raises(DataError, match="needs labelled rows"):
        encode([Chat(TURNS, "mem:1")], byte_tokenizer(chat=CHATML, framed=True), "masked", 64)


# -- rows


def test_rows_are_plain_and_picklable():
    encoded = encode([labelled("the film was", 1)] * 2, byte_tokenizer(), "causal", 32)
    assert type(encoded[0]["input_ids"]) is list and encoded[-1] == encoded[0] and len(encoded[0:2]) == 2
    assert pickle.loads(pickle.dumps(encoded))[1] == encoded[1]
    with pytest.raises(IndexError):
        encoded[2]


# -- description


def test_description_shows_what_carries_loss():
    tokenizer = byte_tokenizer(bos=True)
    found = describe(encode([labelled("the film was", 1), labelled("It", 0)], tokenizer, "causal", 32), tokenizer)
    assert found["example"] == [("<s>the film was", False), (" great", True)]
    assert found["rows"] == 2 and found["label_tokens"] == 2 and found["length"]["max"] == 5
    assert found["histogram"] == [(1, 1, 0), (2, 2, 0), (3, 3, 1), (4, 4, 0), (5, 5, 1)]
    t5 = sentence_tokenizer()
    shown = describe(encode([labelled("the film", 1)], t5, "seq2seq", 32), t5)["example"]
    assert shown == [("the film</s>", False), ("great</s>", True)]
    bert = word_tokenizer()
    shown = describe(encode([labelled("the film", 1)], bert, "masked", 32), bert)["example"]
    assert shown == [("[CLS] the film", False), (" great", True), (". [SEP]", False)]
    shown = describe(encode([labelled("the film", 1)], bert, "classification", 32), bert)["example"]
    assert shown == [("[CLS] the film [SEP]", False), ("class 1", True)]


# -- real data


@pytest.mark.slow
def test_real_bert_words():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "bert-uncased-tokenizer"))
    encoded = encode([labelled("a fine film . It was", 1)], tokenizer, "masked", 32)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] a fine film. it was [MASK]. [SEP]"
    assert tokenizer.convert_ids_to_tokens(list(encoded.choices)) == ["terrible", "great"]


# -- passages


def spread(passage: str, question: str, suffix: str = "") -> Example:
    """A row whose passage stands at the left of its question."""
    prompt = f"{passage} {question}"
    return Example(prompt, " great", suffix, (" terrible", " great"), 1, (), (), (), (0, len(passage)))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(bos=True), byte_tokenizer()], ids=["start", "no start"])
def test_a_long_row_loses_the_left_of_its_passage(tokenizer):
    example = spread("the film was fine . a story of one day and", "What is It")
    whole = encode([example], tokenizer, "causal", 64)[0]["input_ids"]
    head = 1 if whole[0] == tokenizer.bos_token_id else 0
    least = head + len(tokenizer(" What is It great", add_special_tokens=False)["input_ids"])
    for limit in range(least, len(whole)):
        encoded = encode([example], tokenizer, "causal", limit)
        assert encoded[0]["input_ids"] == whole[:head] + whole[head + len(whole) - limit :]
        assert answer_of(encoded[0], tokenizer) == " great"
        assert encoded.notices == [f"1 of 1 rows: longer than {limit} tokens, the left of the passage is cut"]
    with pytest.raises(DataError, match=f"example 1 needs {least} tokens without its passage, and a row has {least - 1}"):
        encode([example], tokenizer, "causal", least - 1)
    with pytest.raises(DataError, match="without its passage"):
        encode_prompts([example], tokenizer, "causal", least - 2)
    prompt = encode_prompts([example], tokenizer, "causal", least - 1)[0]["input_ids"]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == " What is It"


def test_a_chosen_length_holds_the_longest_question():
    tokenizer = byte_tokenizer(bos=True)
    rows = [labelled("the film was", 1)] * 39 + [Example("What is It a story of one day", " great", passage=(0, 0))]
    encoded = encode(rows, tokenizer, "causal")
    assert len(encoded[39]["input_ids"]) == encoded.max_length == max(encoded.lengths) > len(encoded[0]["input_ids"])
    with pytest.raises(DataError, match="example 40 needs"):
        encode(rows, tokenizer, "causal", context=6)


def test_options_keep_their_question():
    tokenizer = byte_tokenizer(bos=True)
    words = (" great", " terrible story of one day")
    example = Example("the film was fine . What is", words[0], "", words, 0, passage=(0, len("the film was fine .")))
    whole = encode_options([example], tokenizer, "causal", 64)
    limit = max(whole.lengths) - 3
    encoded = encode_options([example], tokenizer, "causal", limit)
    for full, row, word in zip(whole, encoded, words, strict=True):
        assert row["input_ids"] == [full["input_ids"][0], *full["input_ids"][4:]] and answer_of(row, tokenizer) == word
    with pytest.raises(DataError, match="without its passage"):
        encode_options([example], tokenizer, "causal", max(whole.lengths) - 6)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(framed=True), word_tokenizer()], ids=["roberta", "bert"])
def test_a_masked_pair_keeps_mask_and_second_sentence(tokenizer):
    example = spread("the film was fine a story of one day", "What", " , It was bad")
    whole = encode([example], tokenizer, "masked", 64)[0]["input_ids"]
    cut = encode([example], tokenizer, "masked", len(whole) - 5)[0]
    assert cut["input_ids"] == whole[:1] + whole[6:] and cut["input_ids"].count(tokenizer.mask_token_id) == 1
    with pytest.raises(DataError, match="without its passage"):
        encode([example], tokenizer, "masked", 5)


def test_a_passage_after_the_mask_loses_its_right():
    tokenizer = word_tokenizer()
    suffix = " It was the film was fine a story of one day"
    start = len(" great It was ")
    example = Example("", " great", suffix, (" great", " bad"), 0, passage=(start, len(" great" + suffix)))
    encoded = encode([example], tokenizer, "masked", 8)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] [MASK] it was the film was [SEP]"
    assert encoded.notices == ["1 of 1 rows: longer than 8 tokens, the right of the passage is cut"]
    with pytest.raises(DataError, match="without its passage"):
        encode([example], tokenizer, "masked", 4)


def test_a_seq2seq_question_stays():
    tokenizer = sentence_tokenizer()
    example = spread("the film was fine . a story of one day and", "What is It")
    whole = encode([example], tokenizer, "seq2seq", 64)[0]["input_ids"]
    assert encode([example], tokenizer, "seq2seq", len(whole) - 4)[0]["input_ids"] == whole[4:]
    with pytest.raises(DataError, match="without its passage"):
        encode([example], tokenizer, "seq2seq", 3)


def test_answers_are_found_by_position_where_a_break_stands_before_them():
    for tokenizer in (byte_tokenizer(bos=True), sentence_tokenizer(), word_tokenizer()):
        rows = [Example("What is It?\n", word, "", ("great", "bad"), 0) for word in ("great", "bad")]
        for row, example in zip(encode(rows, tokenizer, "causal", 64), rows, strict=True):
            assert answer_of(row, tokenizer).split()[-1].endswith(example.answer)


def test_a_generated_answer_ends_with_its_line():
    tokenizer = byte_tokenizer()
    row = encode([Example("What is It", " the film\n", golds=("the film",))], tokenizer, "causal", 64)[0]
    assert answer_of(row, tokenizer) == " the film\n"


def test_a_row_that_begins_with_its_answer_needs_a_start_token():
    example = Example("", "great film", "", ("great film", "bad film"), 0, passage=(0, 0))
    row = encode([example], byte_tokenizer(bos=True), "causal", 64)[0]
    assert answer_of(row, byte_tokenizer()) == "great film"
    with pytest.raises(ConfigError, match="nothing before its"):
        encode([example], byte_tokenizer(), "causal", 64)


# -- a task's prompts as turns


def test_vicuna_turns():
    (turned,) = as_turn([Example("What is\n", "Yes", "", ("Yes", "No"), 0, passage=(0, 4))], "vicuna")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert turned.prompt == f"{system} USER: What is ASSISTANT:" and turned.options == (" Yes", " No")
    assert turned.answer == " Yes" and turned.prompt[slice(*turned.passage)] == "What"


def test_turns_by_the_models_template():
    plain = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = byte_tokenizer(bos=True, chat=plain)
    (turned,) = as_turn([labelled("the film was", 1)], "model", tokenizer)
    assert turned.prompt == "user: the film was\nassistant:" and turned.answer == " great"  # the template's own space
    row = encode([turned], tokenizer, "causal", 64)[0]
    assert tokenizer.decode(row["input_ids"]) == "<s>user: the film was\nassistant: great"
    glued = byte_tokenizer(chat=CHATML)
    (turned,) = as_turn([labelled("the film was", 1)], "model", glued)
    assert turned.prompt == "<|im_start|>user\nthe film was<|im_end|>\n<|im_start|>assistant\n"
    assert turned.options == ("terrible", "great") and turned.prompt[slice(*turned.passage)] == "the film was"
    cut = encode([turned], glued, "causal", len(encode([turned], glued, "causal", 64)[0]["input_ids"]) - 2)[0]
    assert glued.decode(cut["input_ids"]) == "<|im_start|>user\n was<|im_end|>\n<|im_start|>assistant\ngreat"


def test_turns_need_a_template():
    with pytest.raises(ConfigError, match="no chat template: use chat vicuna"):
        as_turn([labelled("the film was", 1)], "model", byte_tokenizer())
    upper = byte_tokenizer(chat="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ConfigError, match="does not show the prompt of example 1 as it is"):
        as_turn([labelled("the film was", 1)], "model", upper)
    with pytest.raises(DataError, match="example 1 has no prompt"):
        as_turn([Example("", "text")], "vicuna")
