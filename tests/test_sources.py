"""Data as it comes: every kind of file, folder and name that `data.path` takes holds the same rows; what is hostile or damaged ends in a clear error."""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT, helps, in_process, refused, typed, ways
from pyarrow import parquet

from src.core.errors import AGAIN, BadData, ConfigError, MissingInput, MissingTool, NoMemory, UserError, WrongKind
from src.records.conversations import FORMATS, Tally, read
from src.records.sources import found, hub, opened, tables
from src.settings.data import COLUMNS

ROWS = [{"prompt": f'질문 {i}, "quoted"\nnext line', "completion": f"답 {i}; é, tab\there"} for i in range(12)]
TURNS = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]} for r in ROWS]
ALL = ["data.val=0.25", "data.calib=0.25"]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter=",", rows=ROWS) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def zipped(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return packed.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def write_parquet(path: Path, rows, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, **more)


def write_arrow(path: Path, rows, kind="stream") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), held.schema) as writer:
        writer.write_table(held, max_chunksize=5)


def saved(folder: Path, rows) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=2)


def saved_dict(folder: Path) -> None:
    import datasets

    whole = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(whole).save_to_disk(str(folder))


def like_the_hub(folder: Path) -> None:
    """Two subsets, of which README.md says the files."""
    write_parquet(folder / "fine" / "train-00000-of-00002.parquet", ROWS[:6])
    write_parquet(folder / "fine" / "train-00001-of-00002.parquet", ROWS[6:])
    write_parquet(folder / "fine" / "test-00000-of-00001.parquet", ROWS[:1])
    (folder / "other.jsonl").write_bytes(lines([{"prompt": "x", "completion": "y"}]))
    subsets = [("fine", [("train", "fine/train-*"), ("test", "fine/test-*")]), ("rest", [("train", "other.jsonl")])]
    configs = [{"config_name": name, "data_files": [{"split": s, "path": p} for s, p in files]} for name, files in subsets]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\nA data set.\n")


def several(folder: Path, *parts: tuple[str, bytes]) -> None:
    for name, content in parts:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


CSV, JSONL = table().encode(), lines(ROWS)
FORMS = {
    "array.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "lines.jsonl": lambda p: p.write_bytes(JSONL),
    "turns.jsonl": lambda p: p.write_bytes(lines(TURNS)),
    "utf16.json": lambda p: p.write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("utf-16")),
    "utf16_unmarked.jsonl": lambda p: p.write_bytes(JSONL.decode().encode("utf-16-le")),
    "utf32.jsonl": lambda p: p.write_bytes(JSONL.decode().encode("utf-32")),
    "commas.csv": lambda p: p.write_bytes(CSV),
    "semicolons.csv": lambda p: p.write_text(table(";"), newline=""),
    "bom.csv": lambda p: p.write_bytes(b"\xef\xbb\xbf" + CSV),
    "utf16.csv": lambda p: p.write_bytes(CSV.decode().encode("utf-16")),
    "tabs.tsv": lambda p: p.write_text(table("\t"), newline=""),
    "turns.csv": lambda p: p.write_text(table(rows=[{"messages": json.dumps(r["messages"])} for r in TURNS]), newline=""),
    "python_lists.csv": lambda p: p.write_text(table(rows=[{"messages": str(r["messages"])} for r in TURNS]), newline=""),
    "pairs.parquet": lambda p: write_parquet(p, ROWS, row_group_size=5),
    "turns.parquet": lambda p: write_parquet(p, TURNS, compression="zstd"),
    "file.arrow": lambda p: write_arrow(p, ROWS, "file"),
    "stream.arrow": lambda p: write_arrow(p, TURNS),
    "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL)),
    "two_streams.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL[:99]) + gzip.compress(JSONL[99:])),
    "no_suffix": lambda p: p.write_bytes(gzip.compress(JSONL)),
    "lines.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(JSONL)),
    "lines.jsonl.xz": lambda p: p.write_bytes(lzma.compress(JSONL)),
    "lines.jsonl.zst": lambda p: p.write_bytes(zstd(JSONL)),
    "table.csv.gz": lambda p: p.write_bytes(gzip.compress(CSV)),
    "table.zip": lambda p: p.write_bytes(zipped(chats__csv=CSV)),
    "saved": lambda p: saved(p, ROWS),
    "saved_dict": saved_dict,
    "folder": lambda p: several(
        p, ("a.jsonl", lines(ROWS[:5])), ("b/c.csv.gz", gzip.compress(table(rows=ROWS[5:]).encode())), ("LICENSE", b"x")
    ),
    "splits": lambda p: several(p, ("data/train-0.jsonl", JSONL), ("data/test-0.jsonl", lines(ROWS[:1])), ("notes.txt", b"Not data.\n")),
    "glob/*.jsonl": lambda p: several(p.parent, ("a.jsonl", lines(ROWS[:5])), ("b.jsonl", lines(ROWS[5:])), ("c.txt", b"no")),
    "globs/**/*.parquet": lambda p: write_parquet(p.parent.parent / "deep" / "er" / "a.parquet", ROWS),
    "hub": like_the_hub,
}
MORE = {"hub": ["data.subset=fine"]}


@pytest.fixture
def contents(call, tmp_path):
    """contents(*overrides): messages of all rows that `data` makes, sorted, and what it said."""

    def make(*overrides):
        done = call("data", "force=true", *ALL, *overrides)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "outputs" / "default" / "data"
        rows = [json.loads(line) for name in ("train", "val", "calib") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        return sorted((row["messages"] for row in rows), key=json.dumps), done.stderr

    return make


SAME = sorted((row["messages"] for row in TURNS), key=json.dumps)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_rows(contents, tmp_path, form):
    path = tmp_path / "in" / form
    path.parent.mkdir(parents=True)
    FORMS[form](path)
    rows, said = contents(f"data.path='{path}'", *MORE.get(form, []))
    assert rows == SAME
    assert "12 records in" in said and ("columns prompt, completion" in said or "columns messages" in said)


def test_several_paths_are_read_in_order(contents, tmp_path):
    several(tmp_path / "in", ("a.jsonl", lines(ROWS[:4])), ("b.csv", table(rows=ROWS[4:]).encode()))
    rows, said = contents(f"data.path=[{tmp_path}/in/a.jsonl,{tmp_path}/in/b.csv]")
    assert rows == SAME
    assert "a.jsonl (JSON Lines, prompt_completion): 4 records in, 4 kept" in said and "b.csv (CSV, prompt_completion): 8 records" in said


@helps("records/sources/hub.py", "data.hub_split={}")
def test_a_folder_with_splits_reads_one_and_says_so(contents, call, tmp_path):
    FORMS["splits"](tmp_path / "in")
    assert "data.hub_split=train alone is read; not notes.txt, data/test-0.jsonl" in contents(f"data.path={tmp_path}/in")[1]
    assert len(contents(f"data.path={tmp_path}/in", "data.hub_split=test", "data.val=0", "data.calib=0")[0]) == 1
    saved_dict(tmp_path / "dict")
    for folder, words in (("in", "has test, train"), ("dict", "has train, test")):
        done = call("data", f"data.path={tmp_path / folder}", "data.hub_split=dev")
        refused(done, MissingInput, words)
        assert set(ways(done)) == {"data.hub_split=test", "data.hub_split=train"}
        assert contents(f"data.path={tmp_path / folder}", "data.hub_split=train")[0] == SAME


def test_a_change_in_any_file_changes_the_key(call, tmp_path):
    several(tmp_path / "in", ("a.jsonl", lines(ROWS[:4])), ("b.jsonl", lines(ROWS[4:])), ("notes.md", b"x"))
    command = ["data", f"data.path={tmp_path}/in", *ALL]
    assert call(*command).returncode == 0
    (tmp_path / "in" / "notes.md").write_text("not data")
    assert "up to date" in call(*command).stderr
    (tmp_path / "in" / "b.jsonl").write_bytes(lines(ROWS[5:]))
    assert "made otherwise" in call(*command).stderr


# ---- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache with a data set in it as a download leaves it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "datasets--people--chats"
    commit = "a" * 40
    like_the_hub(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return repo


@helps("records/sources/hub.py", "data.subset={}", "hf download {} --repo-type dataset fetches it, or says why it cannot")
def test_a_hub_id_is_read_from_the_hubs_cache(contents, call, hub_cache):
    rows, said = contents("data.path=people/chats", "data.subset=fine")
    assert rows == SAME and "fine/train-00000-of-00002.parquet (Parquet, prompt_completion): 6 records in" in said
    assert len(contents("data.path=people/chats", "data.subset=rest", "data.val=0", "data.calib=0")[0]) == 1
    refused(call("data", "data.path=people/chats"), ConfigError, "several subsets: fine, rest", "data.subset=fine")
    refused(call("data", "data.path=people/chats", "data.subset=best"), ConfigError, "no subset 'best'", "data.subset=fine")
    refused(call("data", "data.path=people/chats", "data.subset=fine", "data.hub_split=dev"), MissingInput, "has test, train")
    refused(call("data", "data.path=people/none"), MissingInput, "hf download people/none --repo-type dataset", hub.ANYTHING)
    refused(call("data", "data.path=people/none", "dry_run=true"), MissingInput, "among the data sets downloaded before")
    shutil.rmtree(hub_cache / "snapshots" / ("a" * 40) / "fine")
    refused(call("data", "data.path=people/chats", "data.subset=fine"), MissingInput, "are not there", AGAIN, hub.ONE_FILE)
    assert contents(f"data.path={hub_cache / 'snapshots' / ('a' * 40) / 'other.jsonl'}", "data.val=0", "data.calib=0")[0]
    refused(call("data", "data.path=people/chats", "data.subset=fine", "data.revision=v2"), MissingInput, "people/chats")
    shutil.copytree(hub_cache, hub_cache.with_name("datasets--people--none"))  # what `hf download` leaves behind
    assert contents("data.path=people/none", "data.subset=rest", "data.val=0", "data.calib=0")[0]


def test_a_hub_id_is_read_from_what_datasets_prepared(contents, tmp_path, monkeypatch):
    import datasets

    write_parquet(tmp_path / "in" / "train.parquet", ROWS)
    prepared = tmp_path / "prepared"
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "in" / "train.parquet"), cache_dir=str(prepared / "made"))
    folder = Path(made["train"].cache_files[0]["filename"]).parent
    target = prepared / "people___chats" / "default" / "0.0.0" / ("b" * 40)
    shutil.copytree(folder, target)
    os.rename(target / "parquet-train.arrow", target / "chats-train.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(prepared))
    rows, said = contents("data.path=people/chats")
    assert rows == SAME and "chats-train.arrow (Arrow stream" in said


def test_what_was_downloaded_is_read_where_the_hub_is_not_reached(contents, call, hub_cache, monkeypatch):
    import datasets
    from huggingface_hub import constants

    def gone(id, *_):
        raise hub._not_there(id, ConnectionError("no route to host"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_listed", gone)
    rows, said = contents("data.path=people/chats", "data.subset=fine")
    assert rows == SAME and "takes what was downloaded before" in said
    refused(call("data", "data.path=people/none"), MissingInput, "no route to host", "hf download people/none")


def test_a_hub_id_is_downloaded_once(cli, tmp_path):
    from stand_ins.hub import COMMIT, serve

    like_the_hub(tmp_path / "in")
    address, got, server = serve(tmp_path / "in")
    online = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = ["data", "data.path=people/chats", "data.subset=fine", *ALL]
    try:
        done = cli(*command, env=online)
        assert done.returncode == 0, done.stderr
    finally:
        server.shutdown()
        server.server_close()
    assert f"people/chats is read as of {COMMIT}" in done.stderr and "12 records in" in done.stderr
    assert sorted(got) == ["README.md", "fine/train-00000-of-00002.parquet", "fine/train-00001-of-00002.parquet"], "one split of one subset"
    assert "up to date" in cli(*command, env=online | {"HF_HUB_OFFLINE": "1"}).stderr
    refused(
        cli(*command, "run=test", "data.hub_split=test", env=online | {"HF_HUB_OFFLINE": "1"}), MissingInput, "not there", "data.path=FILE"
    )


@helps("records/sources/hub.py", "data.path=FILE names one of its files")
def test_a_loading_script_is_not_run(call, contents, tmp_path):
    folder = tmp_path / "chats"
    like_the_hub(folder)
    (folder / "chats.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = call("data", f"data.path={folder}")
    refused(done, WrongKind, "loading script")
    assert ways(done) == [hub.ONE_FILE]
    (folder / "chats.csv").write_bytes(CSV)
    assert contents(f"data.path={folder / 'chats.csv'}")[0] == SAME
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "head",
    [
        "configs: 7",
        "configs: [a: {",
        "configs:\n- config_name: a\n  data_files: ../../*",
        "configs:\n- 5",
        "configs:\n- config_name: a\n  data_files: https://x.org/a",
    ],
)
@helps("records/sources/hub.py", "data.path=FILE names the file itself")
def test_a_readme_without_sense(call, contents, tmp_path, head):
    several(tmp_path / "in", ("README.md", f"---\n{head}\n---\n".encode()), ("a.jsonl", JSONL))
    refused(call("data", f"data.path={tmp_path / 'in'}"), BadData, "README", "data.path=FILE names ")
    assert contents(f"data.path={tmp_path / 'in' / 'a.jsonl'}")[0] == SAME


# ---- what is packed


def test_damage_in_what_is_packed(call, tmp_path, monkeypatch):
    packed = {
        "gz": gzip.compress(JSONL * 500),
        "bz2": bz2.compress(JSONL * 500),
        "xz": lzma.compress(JSONL * 500),
        "zst": zstd(JSONL * 500),
    }
    for suffix, whole in packed.items():
        path = tmp_path / f"chats.jsonl.{suffix}"
        path.write_bytes(whole[: len(whole) * 2 // 3])
        refused(call("data", f"data.path={path}", "data.on_fault=drop"), BadData, "cut off", path)
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 0xFF
        damaged[len(whole) // 2 + 1] ^= 0xFF
        path.write_bytes(damaged)
        refused(call("data", f"data.path={path}", "data.on_fault=drop"), BadData, path)


@helps("records/sources/opened.py", "unpack it yourself, and look at what is in it")
def test_a_bomb_does_not_go_off(call, contents, tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "BOMB_SIZE", 1 << 20)
    whole = b"\n" * (1 << 21) + JSONL
    for name, content in (("a.jsonl.gz", gzip.compress(whole)), ("a.zip", zipped(a__jsonl=whole))):
        (tmp_path / name).write_bytes(content)
        refused(call("data", f"data.path={tmp_path / name}"), BadData, "200 times its size", tmp_path / name)
    (tmp_path / "a.jsonl").write_bytes(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()))
    assert contents(f"data.path={tmp_path / 'a.jsonl'}")[0] == SAME


def test_one_long_line_in_a_packed_file_is_one_bad_record(contents, tmp_path, monkeypatch):
    from src.records import json_stream

    monkeypatch.setattr(json_stream, "RECORD_LIMIT", 10_000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL + b'{"prompt": "' + b"x" * 100_000 + b'"}\n'))
    rows, said = contents(f"data.path={tmp_path / 'a.jsonl.gz'}", "data.on_fault=drop")
    assert rows == SAME and "dropped 1: malformed: record too large" in said


FOREIGN = {
    "two.zip": (zipped(a__jsonl=JSONL, b__jsonl=JSONL), "the zip holds 2 files"),
    "none.zip": (zipped(), "an empty zip"),
    "cut.zip": (zipped(a__jsonl=JSONL)[:200], "the zip file is damaged"),
    "book.xlsx": (zipped(**{"[Content_Types]__xml": b"x"}), "an Office document"),
    "model.pt": (zipped(**{"archive/data__pkl": b"x"}), "a PyTorch pickle"),
    "rows.pkl": (b"\x80\x04\x95rows", "a Python pickle"),
    "rows.db": (b"SQLite format 3\0", "an SQLite database"),
    "rows.7z": (b"7z\xbc\xaf\x27\x1crows", "a 7z archive"),
    "rows.tar.gz": (gzip.compress(b"\0" * 257 + b"ustar\0" + b"\0" * 999), "a tar archive"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(JSONL)), "unpacked, the gzip file is gzip"),
    "pdf.txt": (b"%PDF-1.7", "a PDF"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    "empty.csv": (b"", "the file is empty"),
    "blank.csv": (b"\n\n", "the file is empty"),
    "chats": (CSV, "the file begins with 'prompt,completion"),
    "log.json": (b"2026-01-01 started\n", "the file begins with '2026"),
    "whole.json": (json.dumps({"data": ROWS}, indent=1).encode(), "one JSON object over several lines"),
}
MENDED = {
    "git lfs pull, in the folder it came from": ("", JSONL),
    opened.CSV_UTF_8: (".csv", CSV),
    opened.JSON_LINES: (".jsonl", JSONL),
    "keep only the list of records that is in it": ("", json.dumps(ROWS).encode()),
    AGAIN: ("", JSONL),
}
"""{what a user is told to do: (the suffix of the file that is made so, what is in it)}"""


@helps("records/json_stream.py", "git lfs pull, in the folder it came from", "keep only the list of records that is in it")
@helps("records/sources/opened.py", "save it as CSV UTF-8", "write it as JSON Lines with the program that made it")
@helps("records/sources/kinds.py", "name it .csv, .tsv or .txt, if that is what it is")
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_file_of_records(call, contents, tmp_path, name):
    content, words = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    done = call("data", f"data.path={tmp_path / name}")
    refused(done, BadData, words, tmp_path / name)
    if name == "chats":
        assert ways(done)[1] == "name it .csv, .tsv or .txt, if that is what it is"
        (tmp_path / name).rename(tmp_path / "chats.csv")
        assert contents(f"data.path={tmp_path / 'chats.csv'}")[0] == SAME
    elif ways(done)[0] in MENDED:
        suffix, mended = MENDED[ways(done)[0]]
        path = (tmp_path / name).with_suffix(suffix or Path(name).suffix)
        path.write_bytes(zipped(a__jsonl=mended) if suffix == "" and path.suffix == ".zip" else CSV if path.suffix == ".csv" else mended)
        assert contents(f"data.path={path}")[0] == SAME


def tarred(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name.replace("__", "."))
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return packed.getvalue()


TWO = {"a__jsonl": lines(ROWS[:5]), "b__jsonl": lines(ROWS[5:])}
ENCRYPTED = base64.b64decode(
    "UEsDBBQACQAIAKxlel0GKwY2LQAAACMAAAAHAAAAYS5qc29ubIikgekx+WlJ3kVTACO9hhm4J/CoyVyWQFXR23kWf0ks5FBHOxmQdX4cPXDn8FBLBwgGKwY2"
    "LQAAACMAAABQSwECHgMUAAkACACsZXpdBisGNi0AAAAjAAAABwAAAAAAAAABAAAApIEAAAAAYS5qc29ubFBLBQYAAAAAAQABADUAAABiAAAAAAA="
)
"""{"prompt": "?", "completion": "!"} in a.jsonl, by `zip -P secret`"""
PACKS = {
    "two.zip": (zipped(**TWO), SAME),
    "two": (zipped(**TWO), SAME),
    "my two.v1.tar": (tarred(**TWO), SAME),
    "two.tar.gz": (gzip.compress(tarred(**TWO)), SAME),
    "two.tar.zip": (zipped(a__tar=tarred(**TWO)), SAME),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(JSONL)), SAME),
    "twice.zip": (zipped(**{"in/a__jsonl__xz": lzma.compress(JSONL)}), SAME),
    "table.parquet.bz2": (None, SAME),
    "secret.zip": (ENCRYPTED, [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]]),
}


@helps("records/sources/opened.py", "unzip {} -d {}, then data.path={}", "unzip -P PASSWORD {} -d {}, then data.path={}")
@helps("records/sources/opened.py", "mkdir {} && {} {} | tar x -C {}, then data.path={}", "{} {} > {}, then data.path={}")
@pytest.mark.parametrize("name", PACKS)
def test_the_way_out_of_what_is_packed_helps(contents, call, tmp_path, name):
    content, rows = PACKS[name]
    path = tmp_path / name
    write_parquet(path, ROWS)
    path.write_bytes(content or bz2.compress(path.read_bytes()))
    [way] = ways(call("data", f"data.path='{path}'"))
    command, setting = way.split(", then ")
    if not shutil.which(shlex.split(command.partition("&& ")[2] or command)[0]):
        pytest.skip(f"not here: {command}")
    subprocess.run(["bash", "-ec", command.replace("PASSWORD", "secret")], check=True, timeout=60, capture_output=True)
    assert contents(*shlex.split(setting), "data.val=0", "data.calib=0")[0] == rows


# ---- encodings

SPOKEN = {
    "CP949": ("cp949", "오늘 날씨가 어때요? 맑고 따뜻합니다."),
    "GB18030": ("gb18030", "今天天气怎么样?今天晴朗温暖,适合散步。"),
    "CP932": ("cp932", "今日の天気はどうですか。晴れて暖かいです。"),
    "CP1252": ("cp1252", "Où est la bibliothèque ? C’est à côté de l’hôtel, après la forêt."),
}


CODED = {
    "chats.csv": bytes,
    "chats.jsonl": bytes,
    "chats.csv.gz": gzip.compress,
    "chats.csv.zip": lambda content: zipped(**{"in/chats__csv": content}),
}


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("encoding", SPOKEN)
@helps("records/sources/opened.py", "iconv -f {} -t UTF-8 {} > {}", "{} {} | iconv -f {} -t UTF-8 > {}")
def test_another_encoding_is_refused_with_the_command_that_mends_it(contents, call, tmp_path, encoding, name):
    codec, text = SPOKEN[encoding]
    rows = [{"prompt": f"{text} {i}", "completion": text} for i in range(4)]
    content = table(rows=rows) if ".csv" in name else lines(rows).decode()
    path = tmp_path / name
    path.write_bytes(CODED[name](content.encode(codec)))
    done = call("data", f"data.path={path}")
    refused(done, BadData, "not UTF-8", f"iconv -f {encoding} -t UTF-8", path)
    command = ways(done)[0]
    if not shutil.which(command.split()[0]):
        pytest.skip(f"not here: {command}")
    subprocess.run(["bash", "-ec", command], check=True, timeout=60)
    mended = shlex.split(command)[-1]
    assert sorted(m[0]["content"] for m in contents(f"data.path={mended}")[0]) == sorted(r["prompt"] for r in rows)


@helps("records/sources/opened.py", "pip install charset-normalizer")
def test_the_encoding_needs_a_package(call, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_bytes(table(rows=[{"prompt": SPOKEN["CP949"][1], "completion": "."}]).encode("cp949"))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "charset_normalizer", None)
        refused(call("data", f"data.path={tmp_path / 'a.csv'}"), MissingTool, "pip install charset-normalizer")
    refused(call("data", f"data.path={tmp_path / 'a.csv'}"), BadData, "iconv -f CP949")


@helps("records/sources/opened.py", "save it as UTF-8 with the program that made it")
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_unicode_that_breaks_off(call, tmp_path, name):
    text = CSV.decode() if name == "a.csv" else json.dumps(ROWS) if name == "a.json" else JSONL.decode()
    for codec in ("utf-16", "utf-32"):
        (tmp_path / name).write_bytes(text.encode(codec) + b"\x00")
        refused(call("data", f"data.path={tmp_path / name}", "data.on_fault=drop"), BadData, f"is not the {codec.upper()}", opened.UTF_8)
    (tmp_path / name).write_text(text, newline="")
    assert call("data", f"data.path={tmp_path / name}").returncode == 0


def test_one_text_in_another_encoding_among_others(call, tmp_path):
    (tmp_path / "a.csv").write_bytes(CSV + "x,café\r\n".encode("latin-1"))
    refused(call("data", f"data.path={tmp_path / 'a.csv'}"), BadData, "not UTF-8", "iconv -f", "data.on_fault=drop")
    assert call("data", f"data.path={tmp_path / 'a.csv'}", "data.on_fault=drop").returncode == 0


# ---- tables


def test_a_row_of_a_csv_spoils_itself_alone(contents, call, tmp_path):
    (tmp_path / "a.csv").write_bytes(CSV + b'only one\r\na,b,c\r\n"x"y,z\r\n')
    rows, said = contents(f"data.path={tmp_path / 'a.csv'}", "data.on_fault=drop")
    assert rows == SAME and "dropped 2: malformed: row of another length" in said and "dropped 1: malformed: bad CSV" in said
    named = [json.loads(line) for line in (tmp_path / "outputs" / "default" / "data" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["where"], d["detail"]) for d in named[:2]] == [
        ("a.csv line 26", "row of another length: it has 1 fields, the header 2"),
        ("a.csv line 27", "row of another length: it has 3 fields, the header 2"),
    ]


@helps("records/sources/tables.py", "give each column a name of its own", "put the columns' names into the first line")
@helps("records/conversations.py", "data.columns={prompt:NAME,response:NAME} says what is what (in quotes; all names: docs/data.md)")
@pytest.mark.parametrize(
    "content, words, way",
    [
        (b'prompt,completion\r\nx,"y\r\nz,w\r\n', "a quote that opens in this row is never closed", AGAIN),
        (b"prompt,prompt\r\nx,y\r\n", "names 'prompt' twice", "give each column a name of its own"),
        (b'prompt,"completion\r\nx,y\r\n', "no row of a table", AGAIN),
        (b"prompt,completion\r\n", "holds no records", AGAIN),
        (b",\r\nx,y\r\n", "names no columns", "put the columns' names into the first line"),
        (b"x,y\r\nz,w\r\n", "its columns fit no layout: 'x', 'y'", "data.columns={prompt:NAME,response:NAME}"),
        (b"x,y,z\r\nz,w,v\r\n", "its columns fit no layout: 'x', 'y', 'z'", "data.columns={prompt:NAME,response:NAME}"),
    ],
)
def test_a_csv_without_sense(call, tmp_path, content, words, way):
    (tmp_path / "a.csv").write_bytes(content)
    command = ["data", f"data.path={tmp_path / 'a.csv'}", "data.val=0", "data.calib=0"]
    for on_fault in ("error", "drop"):
        done = call(*command, f"data.on_fault={on_fault}")
        refused(done, BadData, words, tmp_path / "a.csv", way)
    if "NAME" in way:
        command.append(way.replace("NAME", "x", 1).replace("NAME", "y"))
    else:
        (tmp_path / "a.csv").write_bytes(b"prompt,completion\r\nx,y\r\n")
    assert call(*command).returncode == 0


@helps("records/sources/tables.py", "write it with smaller {}")
@pytest.mark.parametrize("kind, way", [("pairs.parquet", "row groups"), ("stream.arrow", "record batches")])
def test_a_table_whose_parts_are_too_large(call, contents, tmp_path, monkeypatch, kind, way):
    """Readers with memory for six rows at a time."""
    rows = tables._rows

    def fits(count: int) -> None:
        if count > 6:
            raise MemoryError("malloc of size 1 failed")

    class Reader(parquet.ParquetFile):
        def iter_batches(self, *how, **more):
            [fits(self.metadata.row_group(i).num_rows) for i in range(self.num_row_groups)]
            return super().iter_batches(*how, **more)

    def few(batches, name):
        return rows((batch for batch in batches if kind == "pairs.parquet" or not fits(batch.num_rows)), name)

    monkeypatch.setattr(tables, "_rows", few)
    monkeypatch.setattr(parquet, "ParquetFile", Reader)
    held, path = pa.Table.from_pylist(ROWS), tmp_path / kind
    if kind == "pairs.parquet":
        parquet.write_table(held, path)
    else:
        with pa.ipc.new_stream(str(path), held.schema) as writer:
            writer.write_table(held)
    refused(call("data", f"data.path={path}"), NoMemory, f"write it with smaller {way}")
    FORMS[kind](path)
    assert contents(f"data.path={path}")[0] == SAME


def test_long_cells(contents, tmp_path):
    (tmp_path / "a.csv").write_bytes(table(rows=[{"prompt": "x" * 300_000, "completion": "y"}]).encode())
    assert len(contents(f"data.path={tmp_path / 'a.csv'}", "data.val=0", "data.calib=0")[0][0][0]["content"]) == 300_000


@pytest.mark.parametrize("kind", ["pairs.parquet", "file.arrow", "stream.arrow"])
def test_damaged_tables(call, tmp_path, kind):
    path = tmp_path / kind
    FORMS[kind](path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:8], whole[: len(whole) // 3] + bytes(40) + whole[len(whole) // 3 + 40 :]):
        path.write_bytes(damaged)
        done = call("data", f"data.path={path}", "data.on_fault=drop", "force=true")
        if done.returncode:
            refused(done, BadData, path)


def test_a_parquet_file_with_a_text_that_is_no_utf8(contents, tmp_path):
    texts = pa.array([b"x", b"\xff\xfe", b"z"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"prompt": texts, "completion": ["a", "b", "c"]}), tmp_path / "a.parquet")
    rows, said = contents(f"data.path={tmp_path / 'a.parquet'}", "data.on_fault=drop", "data.val=0", "data.calib=0")
    assert len(rows) == 2 and "dropped 1: malformed: not UTF-8" in said


def test_what_arrow_fills_in_is_left_out_and_said(contents, tmp_path):
    def row(name, arguments):
        call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    write_parquet(tmp_path / "a.parquet", [row("f", {"x": 1}), row("g", {"y": "two"})])
    rows, said = contents(f"data.path={tmp_path / 'a.parquet'}", "data.val=0", "data.calib=0")
    assert [m[1]["tool_calls"][0]["function"]["arguments"] for m in rows] == [{"x": 1}, {"y": "two"}]
    assert f"{tables.FILLED_IN} (2)" in said


def test_times_that_python_has_no_value_for(contents, tmp_path):
    held = pa.table({"prompt": ["?"] * 3, "completion": ["!"] * 3, "at": pa.array([1 << 62, None, 0], pa.timestamp("ms"))})
    parquet.write_table(held, tmp_path / "a.parquet")
    assert "unknown column ignored: 'at' (3)" in contents(f"data.path={tmp_path / 'a.parquet'}", "data.val=0", "data.calib=0")[1]


def test_a_pickle_in_an_arrow_extension_type_is_not_run(call, tmp_path):
    ran = tmp_path / "ran"
    command = f"touch {ran}"
    pickled = b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR."
    field = pa.field(
        "prompt", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
    )
    held = pa.table([["x"] * 3, ["y"] * 3], schema=pa.schema([field, pa.field("completion", pa.string())]))
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), held.schema) as writer:
        writer.write_table(held)
    parquet.write_table(held, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        done = call("data", f"data.path={tmp_path / name}", "data.val=0", "data.calib=0", "force=true")
        assert done.returncode == 0, done.stderr
        assert not ran.exists()


@pytest.mark.parametrize(
    "form", ["pairs.parquet", "turns.parquet", "file.arrow", "stream.arrow", "turns.csv", "table.zip", "lines.jsonl.zst", "utf16.json"]
)
def test_damaged_bytes_are_read_or_refused(tmp_path, form):
    """Whatever is in a file, it ends no process and in no traceback."""
    path, dice, outcomes = tmp_path / form, random.Random(form), Counter()
    FORMS[form](path)
    whole = path.read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            at, length = dice.randrange(len(damaged)), dice.randint(1, 30)
            damaged[at : at + dice.choice([0, 1, length])] = dice.choice([b"", damaged[at : at + length], bytes([dice.randrange(256)])])
        path.write_bytes(damaged)
        tally = Tally()
        try:
            found = sum(1 for _ in read(path, format="auto", on_fault="drop", tally=tally))
            assert tally.rows_in == found + tally.dropped.total()
            outcomes["read"] += 1
        except UserError as error:
            str(error).encode()
            outcomes["refused"] += 1
    assert outcomes.total() == 40


# ---- names that lead nowhere


@helps("records/sources/hub.py", "data.path=FILE names a file, a folder, a glob such as 'chats/*.jsonl', or a data set of the hub")
@helps("records/sources/found.py", "ls {} shows what is there")
@helps("records/sources/found.py", "data.path=FILE names one; of a folder those named {} are read, packed or not")
def test_names_that_lead_nowhere(call, contents, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    for path, words in {
        "loop": "leads nowhere, or to itself",
        "gone": "leads nowhere",
        "empty": "no file of records",
        "x*.jsonl": "no file matches",
        "empty/**/none/*.jsonl": "no file matches",
        "none.jsonl": "no such file",
    }.items():
        done = call("data", f"data.path='{tmp_path / path}'")
        refused(done, MissingInput, words, tmp_path / path)
        if "*" in path:
            several(tmp_path, ("empty/chats.dat", JSONL), ("chats.dat", JSONL))
            listed = subprocess.run(ways(done)[0].removesuffix(" shows what is there"), shell=True, capture_output=True, text=True)
            assert "chats.dat" in listed.stdout.split()
        else:
            assert "data.path=FILE names " in ways(done)[0]
    refused(call("data", "data.path=chats/none.jsonl.gz"), MissingInput, "no such file", hub.ANYTHING)
    refused(call("data", "data.path=[]"), ConfigError, "data.path")
    refused(call("data", f"data.path={tmp_path / 'empty'}"), MissingInput, "data.path=FILE names one")
    for there in (tmp_path / "empty" / "chats.dat", f"{tmp_path}/*.dat"):
        assert contents(f"data.path='{there}'")[0] == SAME


@helps("records/sources/found.py", "data.subset=null")
def test_a_folder_without_subsets(call, contents, tmp_path):
    several(tmp_path / "in", ("a.jsonl", JSONL))
    done = call("data", f"data.path={tmp_path / 'in'}", "data.subset=fine")
    refused(done, MissingInput, "none called 'fine'")
    assert contents(f"data.path={tmp_path / 'in'}", "data.subset=fine", *ways(done))[0] == SAME


def test_a_saved_folder_that_lacks_a_file_is_copied_again(call, contents, tmp_path):
    saved(tmp_path / "whole", ROWS)
    shutil.copytree(tmp_path / "whole", tmp_path / "in")
    next((tmp_path / "in").glob("*.arrow")).unlink()
    refused(call("data", f"data.path={tmp_path / 'in'}"), BadData, "files that are not beside it", AGAIN)
    shutil.copytree(tmp_path / "whole", tmp_path / "in", dirs_exist_ok=True)
    assert contents(f"data.path={tmp_path / 'in'}")[0] == SAME


@helps("data.py", "data.on_fault=error lists what is wrong", "more records")
@helps("records/conversations.py", "mend the records that are named")
@helps("records/conversations.py", "data.on_fault=drop leaves them out, counts them and names each in dropped.jsonl")
def test_records_that_are_malformed(call, contents, tmp_path):
    path = tmp_path / "a.jsonl"
    bad = lines([{"prompt": "?", "completion": 5.5}] * 2)
    path.write_bytes(bad)
    command = ["data", f"data.path={path}"]
    done = call(*command, "data.on_fault=drop")
    refused(done, BadData, "no record is left to train on (dropped 2: malformed")
    done = call(*command, *typed(ways(done)[0]))
    refused(done, BadData, "2 of 2 records are malformed", f"{path.name} line 1", "mend the records that are named")
    path.write_bytes(bad + JSONL)
    done = call(*command)
    rows, said = contents(command[1], *typed(ways(done)[1]))
    assert rows == SAME and "dropped 2: malformed" in said
    assert len((tmp_path / "outputs" / "default" / "data" / "dropped.jsonl").read_text().splitlines()) == 2
    path.write_bytes(JSONL)
    assert contents(command[1])[0] == SAME
    path.write_bytes(lines([{"prompt": "?", "completion": " "}]))
    refused(call(*command, "force=true"), BadData, "every assistant turn is empty", "more records")
    path.write_bytes(path.read_bytes() + JSONL)
    assert contents(command[1])[0] == SAME


def test_a_folder_that_is_linked_into_itself_is_read_once(contents, tmp_path):
    several(tmp_path / "in", ("a.jsonl", JSONL))
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert contents(f"data.path={tmp_path / 'in'}")[0] == SAME


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.jsonl", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("my_dev.csv", "validation"),
        ("test/a.json", "test"),
        ("chats.jsonl", None),
        ("latest.jsonl", None),
        ("trainer.jsonl", None),
    ],
)
def test_split_in(name, split):
    assert found.split_in(name) == split


# ---- the page


def test_each_command_of_the_page_on_data_works(hub_cache, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    commands = [shlex.split(line)[3:] for line in page.splitlines() if line.startswith("    python -m src.data")]
    monkeypatch.chdir(tmp_path)
    several(Path(), ("chats.jsonl", JSONL), ("chats.csv", CSV), ("held_out.jsonl", lines(ROWS[:2])), ("folder/a.jsonl", JSONL))
    several(Path(), ("chats.jsonl.zst", zstd(JSONL)), ("odd.csv", b"Frage,Antwort\n?,!\n"))
    several(Path(), ("exam.jsonl", lines([{"question": "Who?", "answer": "She."}])), ("questions.csv", b"question\nWhere?\n"))
    dialog = [{"speaker": "customer", "said": "?"}, {"speaker": "agent", "said": "!"}]
    (tmp_path / "odd.jsonl").write_text(json.dumps({"dialog": dialog}))
    write_parquet(tmp_path / "chats.parquet", ROWS)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    assert len(commands) > 10
    for number, overrides in enumerate(commands):
        done = in_process("data", *overrides, f"outputs={tmp_path / 'outputs'}", f"run=r{number}")
        assert done.returncode == 0, f"{overrides}\n{done.stderr}"
    assert all(f"`{name}`" in page for name in (*COLUMNS, *FORMATS))


# ---- memory

PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module("src.data", run_name="__main__", alter_sys=True)
finally:  # ru_maxrss would begin with what the process that started this one held
    print("PEAK", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(tmp_path, path: Path) -> int:
    """MB of memory at most that `data` held on the file, in a process of its own."""
    argv = [sys.executable, "-c", PEAK, "data", f"data.path={path}", f"outputs={tmp_path / 'outputs'}", f"run={path.stem}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert "PEAK" in done.stdout, done.stderr
    return int(done.stdout.split("PEAK")[1]) // 1000


@pytest.mark.slow
def test_a_million_rows_of_parquet_in_bounded_memory(tmp_path):
    def write(path, count):
        with parquet.ParquetWriter(path, pa.schema({"prompt": pa.string(), "completion": pa.string()})) as writer:
            for begin in range(0, count, 100_000):
                rows = range(begin, min(begin + 100_000, count))
                texts = [f"{i}: {'what is the weather like today? ' * 10}" for i in rows]
                writer.write_table(
                    pa.table({"prompt": texts, "completion": [t[::-1] for t in texts]}, writer.schema), row_group_size=len(texts)
                )

    write(tmp_path / "few.parquet", 1000)
    write(tmp_path / "million.parquet", 1_000_000)
    few, million = peak(tmp_path, tmp_path / "few.parquet"), peak(tmp_path, tmp_path / "million.parquet")
    print(f"peak memory: {few} MB for a thousand rows, {million} MB for a million")
    assert million < few + 300
