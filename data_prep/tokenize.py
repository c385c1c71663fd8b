"""Tokenize documents into shards: tokenize.py INPUTS... --tokenizer byte|FILE --out DIR."""

# ruff: noqa: E402

import os
import sys

# tokenize.py has the name of a standard module: this folder must not be searched for imports.
HERE = os.path.realpath(os.path.dirname(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != HERE]

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from megarec.cli import fraction, new_folder, run
from megarec.data.documents import read_documents
from megarec.data.manifest import Manifest
from megarec.data.prepare import bytes_before_holdout, head, tail, write_documents
from megarec.data.shards import DEFAULT_SHARD_TOKENS, ShardWriter
from megarec.data.tokenizer import load_tokenizer
from megarec.errors import UserError


def main() -> None:
    """Read the arguments, write the shards and print a summary."""
    args = parse_args()
    # Read by the tokenizers library when it starts its threads.
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(args.workers))
    tokenizer = load_tokenizer(args.tokenizer)
    start = time.perf_counter()

    def documents() -> Iterator[str]:
        for source in args.inputs:
            yield from read_documents(source, text_key=args.text_key, split=args.split)

    parts = {".": documents}
    if args.holdout:
        cut = bytes_before_holdout(documents(), args.holdout)
        parts = {"train": lambda: head(documents(), cut), "valid": lambda: tail(documents(), cut)}

    contents = ("manifest.json", "shard_*", "train", "valid")
    summary = []
    with new_folder(args.out, force=args.force, contents=contents) as folder:
        for name, part in parts.items():
            writer = ShardWriter(folder / name, tokenizer, shard_tokens=args.shard_tokens)
            write_documents(part(), writer)
            manifest = writer.close()
            where = args.out / name
            if manifest.documents == 0:
                raise UserError(f"{where}: no documents: the input is empty, or --holdout unfit")
            summary.append(describe(where, manifest, writer.empty_documents))
    print(*summary, f"{time.perf_counter() - start:.1f} seconds", sep="\n")


def describe(where: Path, manifest: Manifest, empty: int) -> str:
    """Return one line on a folder of shards."""
    line = (
        f"{where}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes/token"
    )
    return f"{line}, {empty:,} empty documents dropped" if empty else line


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help=".txt, .jsonl(.gz), .parquet, or a dataset's folder or name")
    add("--tokenizer", required=True, help="'byte', or the path of a tokenizer.json")
    add("--out", required=True, type=Path, help="folder to write")
    add("--holdout", type=fraction, help="share of the bytes, from the end, for DIR/valid")
    add("--workers", type=positive, default=os.cpu_count(), help="threads (default: all cores)")
    add("--text-key", default="text", help="field that holds the text (default: text)")
    add("--split", default="train", help="split of a dataset (default: train)")
    add("--shard-tokens", type=positive, default=DEFAULT_SHARD_TOKENS, help="tokens per shard")
    add("--force", action="store_true", help="replace an earlier output")
    return parser.parse_args()


def positive(text: str) -> int:
    """Parse a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive integer")
    return value


if __name__ == "__main__":
    run(main)
