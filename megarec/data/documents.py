"""Read raw documents, one at a time, from text, jsonl, parquet or a Hugging Face dataset."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megarec.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def read_documents(source: str, *, text_key: str = "text", split: str = "train") -> Iterator[str]:
    """Yield the documents of one input, in order; empty ones too.

    ``source``: a .txt file (one document), a .jsonl(.gz) or .parquet file (``text_key`` of each
    row), or a Hugging Face dataset's folder or name (``text_key`` of each row of ``split``).
    Raises UserError, naming file and line, for input that cannot be read.
    """
    path = Path(source)
    if source.endswith(SUFFIXES) and not path.is_file():
        raise UserError(f"{source}: no such file")
    if source.endswith(".txt"):
        yield _decode(path.read_bytes(), source)
    elif source.endswith((".jsonl", ".jsonl.gz")):
        yield from _texts(_jsonl_rows(path), source, text_key)
    elif source.endswith(".parquet"):
        yield from _texts(_parquet_rows(path, text_key), source, text_key)
    elif path.is_file():
        raise UserError(f"{source}: unknown kind of file; expected {', '.join(SUFFIXES)}")
    else:
        yield from _texts(_dataset_rows(source, split), source, text_key)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert it first") from error


def _texts(rows: Iterable[tuple[int, Any]], where: str, text_key: str) -> Iterator[str]:
    for number, row in rows:
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{where}:{number}: expected a text under '{text_key}', got {got}; use --text-key"
            )
        if not _is_unicode(text):
            raise UserError(f"{where}:{number}: a lone surrogate: the text is not Unicode")
        yield text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number}: not JSON lines: {error}") from error


def _parquet_rows(path: Path, text_key: str) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file: {error}") from error
    names = file.schema_arrow.names
    if text_key not in names:
        raise UserError(f"{path}: no column '{text_key}'; columns: {', '.join(names)}")
    rows = (row for batch in file.iter_batches(columns=[text_key]) for row in batch.to_pylist())
    yield from enumerate(rows, start=1)


def _dataset_rows(source: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        if (Path(source) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(source)[split]
        elif (Path(source) / "state.json").is_file():
            rows = datasets.load_from_disk(source)
        else:
            rows = datasets.load_dataset(source, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source}: neither a file ({', '.join(SUFFIXES)}) nor a dataset with split "
            f"'{split}': {reason}"
        ) from error
    yield from enumerate(rows, start=1)
