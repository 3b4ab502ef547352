"""Plain text: how documents are told apart, what becomes tokens, and which rows they are cut into."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CHAT, helps

from src.core.artifact import outside
from src.core.compose import compose
from src.core.errors import BadData, MissingInput
from src.core.stage import Run
from src.models import fresh
from src.models.loading import load_tokenizer
from src.records import texts
from src.settings.verbs import CptVerb
from src.training import text_rows

STORIES = [
    f"Story {i}. The {animal} sat by the {place}, and it was glad.\nThen it slept."
    for i in range(30)
    for animal, place in (("cat", "door"), ("dog", "sea"))
]


@pytest.fixture
def read(tmp_path):
    """read(name, content, separator="auto") -> the documents of a file, each as one text."""

    def read(name: str, content: str | bytes, separator: str = "auto") -> list[str]:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        found: list[str] = []
        for piece in texts.pieces(outside(file, "file"), separator):
            found = [*found, piece.text] if piece.first else [*found[:-1], found[-1] + piece.text]
        return found

    return read


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer learnt from STORIES."""
    folder = tmp_path_factory.mktemp("tokenizer")
    fresh.learn_tokenizer(STORIES, 300, 64, folder)
    return folder


def rows(text: Path, tokenizer, cache: Path, *overrides: str):
    cfg = compose("cpt", [f"text={text}", *overrides], CptVerb)
    return text_rows.rows_of(cfg, outside(text, "file"), tokenizer, cache)


# ---- documents


@pytest.mark.parametrize(
    "content, separator, wanted",
    [
        ("one\nmore\n<|endoftext|>\ntwo\n<|endoftext|>\n", "auto", ["one\nmore", "two"]),
        ("one\n\ntwo\n", "auto", ["one\n\ntwo"]),
        ("\ufeffone\r\n\r\ntwo\n \n\n three\n", "blank_line", ["one", "two", "three"]),
        ("one<|endoftext|>two", "file", ["one<|endoftext|>two"]),
        ("a\n--- 8< ---\nb", "--- 8< ---", ["a", "b"]),
        ("  \n<|endoftext|>\n", "auto", []),
        ("가나\n<|endoftext|>\n다라", "auto", ["가나", "다라"]),
    ],
)
def test_documents_of_a_text_file(read, content, separator, wanted):
    assert read("a.txt", content, separator) == wanted


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", '{"text": "one"}\n{"text": " two\\n", "id": 3}\n'),
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
        ("a.csv", "text,n\none,1\ntwo,2\n"),
    ],
)
def test_documents_of_records(read, name, content):
    assert read(name, content) == ["one", "two"]


@pytest.mark.parametrize("separator", ["auto", "blank_line"])
def test_a_document_in_pieces_is_the_document(read, monkeypatch, separator):
    """However long it is against what is read at a time, and wherever a separator falls."""
    between = "\n<|endoftext|>\n" if separator == "auto" else "\n \n"
    documents = ["x" * 700, "word " * 150 + "end", "\n".join(f"line {i}" for i in range(150)), "short"]
    wanted = read("a.txt", between.join(documents), separator)
    assert wanted == documents
    for piece in (64, 97):
        monkeypatch.setattr(texts, "PIECE", piece)
        assert read("b.txt", "<|endoftext|>"[: 13 * (separator == "auto")] + between.join(documents), separator) == documents
        assert read("b.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in documents)) == documents


@helps(
    "records/texts.py",
    "call the column with the text `text`",
    "mend the record, or take it out",
    "text=PATH names a file, a folder, a glob such as 'books/*.txt', or a data set of the hub",
)
def test_what_is_no_text_is_said_with_its_place(read, tmp_path):
    for name, content, words, mended in (
        ("a.txt", b"fine\n<|endoftext|>\nno\xff", "not UTF-8: byte 0xff", b"fine\n<|endoftext|>\nno"),
        ("a.jsonl", b'{"body": "x"}\n', "no text under `text`; it has body", b'{"text": "x"}\n'),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "bad JSON", b'{"text": "x"}\n'),
        ("a.json", b'[{"text": "x"}, {"text"', "the file ends in the middle", b'[{"text": "x"}]'),
    ):
        with pytest.raises(BadData) as told:
            read(name, content)
        assert words in str(told.value) and name in told.value.where and told.value.fix
        assert read(name, mended)
    with pytest.raises(MissingInput) as missing:
        texts.find(str(tmp_path / "none.txt"), Run(tmp_path / "r", dry=True))
    assert missing.value.fix[0].startswith("text=PATH") and texts.find(str(tmp_path / "a.txt"), Run(tmp_path / "r", dry=True)).files


def test_tinystories_is_asked_of_the_hub_unless_a_file_is_called_so(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        texts,
        "found",
        lambda path, **given: (
            asked.append((path, given["split"])) or SimpleNamespace(root=CHAT / "config.json", files=None, revision="abc", left=())
        ),
    )
    texts.find("tinystories", Run(tmp_path / "r", dry=True))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinystories").write_text("x")
    texts.find("tinystories", Run(tmp_path / "r", dry=True))
    assert asked == [("roneneldan/TinyStories", "train"), ("tinystories", "train")]


# ---- a tokenizer


def test_a_tokenizer_is_the_same_each_time_and_gives_any_text_back(tokenizer, tmp_path):
    fresh.learn_tokenizer(STORIES, 300, 64, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    made = load_tokenizer(tokenizer)
    assert len(made) == 300 == fresh.tokens_of(tokenizer) and (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
    for text in ("안녕 🙂 \t\r\n  naïve", "The cat sat", "\x00\x7f"):
        ids = made(text).input_ids
        assert ids[0] == 1 and made.decode(ids[1:]) == text
    assert len(made(STORIES[0]).input_ids) < len(STORIES[0]) / 2


@helps("models/fresh.py", "size.vocab={}", "more text")
def test_a_text_with_too_few_tokens(tmp_path):
    with pytest.raises(BadData, match="holds 264 different tokens, not 400") as told:
        fresh.learn_tokenizer(["aaaa bbbb"] * 3, 400, 64, tmp_path)
    assert told.value.fix == ["size.vocab=264", "more text"]
    fresh.learn_tokenizer(["aaaa bbbb"] * 3, 264, 64, tmp_path)
    fresh.learn_tokenizer(STORIES, 300, 64, tmp_path)


# ---- rows


@pytest.fixture
def stories(tmp_path) -> Path:
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(STORIES))
    return file


@pytest.mark.parametrize("length", [2, 7, 64])
def test_each_token_but_a_document_s_first_is_learnt_once(stories, tokenizer, tmp_path, monkeypatch, length):
    """Whatever the length of rows and the size of the files they lie in."""
    monkeypatch.setattr(text_rows, "SHARD", 300)
    monkeypatch.setattr(text_rows, "TOGETHER", 500)
    made = load_tokenizer(tokenizer)
    train, val = rows(stories, made, tmp_path, f"train.max_length={length}", "val=0.2")
    assert len(train.shards) > 1 and train.shards[0].dtype == np.uint16
    documents = {
        1 + i: [1, *made(text, add_special_tokens=False).input_ids, 2]
        for i, text in enumerate(t for t in STORIES if text_rows.split_of(compose("cpt", ["text=x", "val=0.2"], CptVerb), t) == "train")
    }
    learnt = {i: ids[:1] for i, ids in documents.items()}
    for i, row in enumerate(train):
        assert 2 <= len(row.input_ids) <= length and row.labels[0] == -100 and (row.labels[1:] == row.input_ids[1:]).all()
        number = int(train.documents[i]) + 1
        assert learnt[number][-1] == row.input_ids[0], "what stands before its first token is known"
        learnt[number] += row.labels[1:].tolist()
    assert learnt == documents
    assert len(documents) == train.count and train.count + val.count == len(STORIES) and val.count
    assert (train.lengths == [len(row.input_ids) for row in train]).all() and train.trained_tokens.sum() == train.tokens - train.count
    assert train.text_bytes + val.text_bytes == sum(map(len, STORIES))


def test_no_word_of_a_text_becomes_a_control_token(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a </s> b <s> c <pad>")
    (row,) = rows(tmp_path / "a.txt", load_tokenizer(tokenizer), tmp_path, "val=0")[0]
    assert row.input_ids[0] == 1 and row.input_ids[-1] == 2 and not set(row.input_ids[1:-1].tolist()) & {0, 1, 2}


def test_a_document_keeps_its_split_when_others_come(stories, tokenizer, tmp_path):
    cfg = compose("cpt", ["text=x", "val=0.3"], CptVerb)
    held_out = [text for text in STORIES if text_rows.split_of(cfg, text) == "val"]
    assert 5 < len(held_out) < 40
    for count in (len(STORIES), 20):
        stories.write_text("\n<|endoftext|>\n".join(STORIES[:count]))
        made = load_tokenizer(tokenizer)
        val = rows(stories, made, tmp_path, "val=0.3", "train.max_length=512")[1]
        assert [made.decode(row.input_ids[1:-1]) for row in val] == [text for text in held_out if text in STORIES[:count]]


def test_tokens_are_made_once_and_cut_anew(stories, tokenizer, tmp_path, monkeypatch):
    made = load_tokenizer(tokenizer)
    rows(stories, made, tmp_path)
    monkeypatch.setattr(text_rows, "make", lambda *given: pytest.fail("tokenized again"))
    assert rows(stories, made, tmp_path, "train.max_length=5")[0].lengths.max() == 5
    with pytest.raises(pytest.fail.Exception):
        rows(stories, made, tmp_path, "split_seed=1")


def test_more_tokens_than_16_bits_hold(tmp_path, monkeypatch, tokenizer, stories):
    monkeypatch.setattr(text_rows, "NARROW", 100)
    made = load_tokenizer(tokenizer)
    narrow_free = rows(stories, made, tmp_path / "wide")[0]
    monkeypatch.undo()
    assert narrow_free.shards[0].dtype == np.uint32
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(narrow_free, rows(stories, made, tmp_path / "narrow")[0], strict=True))


@helps("training/text_rows.py", "more text", "val=0 holds none out", "name one as eos_token in its tokenizer_config.json")
def test_nothing_to_train_on(tmp_path, tokenizer, capsys):
    file, made = tmp_path / "one.txt", load_tokenizer(tokenizer)
    file.write_text("One document.")
    train, val = rows(file, made, tmp_path, "val=0.999")
    with pytest.raises(BadData, match="no document is left") as told:
        text_rows.check(train, val, outside(file, "file"))
    assert told.value.fix == ["more text", "val=0 holds none out"]
    text_rows.check(*rows(file, made, tmp_path, "val=0"), outside(file, "file"))
    assert "none of 1 documents is held out" in capsys.readouterr().err
    made.eos_token = None
    with pytest.raises(BadData, match="no end token"):
        rows(file, made, tmp_path)
