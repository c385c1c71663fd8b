"""Reading documents of every kind, cutting them, and holding out the end of a corpus."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.cli import new_folder
from megarec.data import prepare
from megarec.data.documents import read_documents
from megarec.data.prepare import encode_documents, head, split_at, split_pieces, tail
from megarec.data.tokenizer import Tokenizer
from megarec.errors import UserError

TEXTS = ["one\n", "", "zwei Wörter", "three\nlines\n\n"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def test_each_kind_gives_the_same_documents(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS) + b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.jsonl").write_bytes(jsonl(TEXTS))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "disk", "splits", "folder"):
        assert list(read_documents(str(tmp_path / name))) == TEXTS, name
    (tmp_path / "b.txt").write_bytes("a\r\nä".encode())
    assert list(read_documents(str(tmp_path / "b.txt"))) == ["a\r\nä"]
    (tmp_path / "k.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    assert list(read_documents(str(tmp_path / "k.jsonl"), text_key="content")) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON lines"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a.jsonl:2: .* 'text', got body"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: .* 'text', got list"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: expected a text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: a lone surrogate"),
        ("a.jsonl.gz", b"plain", r"a.jsonl.gz:0: not JSON lines"),
        ("a.parquet", b"plain", r"a.parquet: not a parquet file"),
        ("a.pdf", b"", r"a.pdf: unknown kind of file; expected .txt, .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.jsonl: no such file"):
        list(read_documents(str(tmp_path / "gone.jsonl")))
    with pytest.raises(UserError, match="gone: neither a file .* nor a dataset"):
        list(read_documents(str(tmp_path / "gone")))


def test_pieces_give_the_same_ids(monkeypatch, tokenizer: Tokenizer) -> None:
    texts = ["", "line one\nline two\nthe third line\n", "x" * 50, "äöü\n"]
    monkeypatch.setattr(prepare, "PIECE_CHARACTERS", 12)
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 20)
    pieces = [piece.text for piece in split_pieces(texts[1])]
    assert pieces == ["line one\n", "line two\n", "the third li", "ne\n"]
    encoded = [(ids.tolist(), size) for ids, size in encode_documents(texts, tokenizer)]
    assert encoded == [(list(text.encode()), len(text.encode())) for text in texts]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="aä\n", max_size=12), max_size=6), st.integers(0, 60))
def test_head_and_tail_are_the_whole(texts: list[str], cut: int) -> None:
    first, last = list(head(texts, cut)), list(tail(texts, cut))
    assert "".join(first + last) == "".join(texts)
    assert len(first) + len(last) in (len(texts), len(texts) + 1)


@pytest.mark.parametrize(
    ("text", "cut", "parts"),
    [
        ("ab\ncd\nef", 5, ("ab\n", "cd\nef")),
        ("ab\ncd\nef", 6, ("ab\ncd\n", "ef")),
        ("abcd\nef", 2, ("abcd\n", "ef")),
        ("ä\nb", 1, ("ä\n", "b")),
        ("abcd", 2, ("abcd", "")),
    ],
)
def test_cut_at_a_line_break(text: str, cut: int, parts: tuple[str, str]) -> None:
    assert split_at(text, cut) == parts


def test_output_folders_are_published_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def make(content: str, *, force: bool = False, fail: bool = False) -> None:
        with new_folder(out, force=force, contents=("*.txt",)) as folder:
            (folder / "a.txt").write_text(content)
            if fail:
                raise UserError("failed half-way")

    with pytest.raises(UserError, match="half-way"):
        make("0", fail=True)
    assert list(out.parent.iterdir()) == []
    make("1")
    with pytest.raises(UserError, match="not empty; .* --force"):
        make("2")
    with pytest.raises(UserError, match="half-way"):
        make("3", force=True, fail=True)
    assert (out / "a.txt").read_text() == "1"
    make("4", force=True)
    assert (out / "a.txt").read_text() == "4"
    (out / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match="'thesis.doc', not ours"):
        make("5", force=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
