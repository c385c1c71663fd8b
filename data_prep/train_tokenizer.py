"""Train a byte-level BPE tokenizer: train_tokenizer.py FILES... --vocab-size N --out FILE."""

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

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megarec.checkpoint.atomic import write_atomic
from megarec.cli import check_new_file, fraction, run
from megarec.data.documents import read_documents
from megarec.data.prepare import bytes_before_holdout, head
from megarec.data.tokenizer import EOD_TOKEN, byte_alphabet
from megarec.errors import UserError

SMALLEST = 257


def main() -> None:
    """Read the arguments, train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", help=".txt, .jsonl(.gz), .parquet, or a dataset's folder or name")
    add("--vocab-size", required=True, type=int, help="ids, the 256 bytes and the EOD included")
    add("--out", required=True, type=Path, help="tokenizer.json to write")
    add("--text-key", default="text", help="field that holds the text (default: text)")
    add("--split", default="train", help="split of a dataset (default: train)")
    add("--holdout", type=fraction, help="share of the bytes to leave out, as tokenize.py does")
    add("--force", action="store_true", help="overwrite --out")
    args = parser.parse_args()
    if args.vocab_size < SMALLEST:
        raise UserError(
            f"--vocab-size {args.vocab_size}: expected at least {SMALLEST} (256 bytes and an EOD)"
        )
    check_new_file(args.out, force=args.force)

    start = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[EOD_TOKEN],  # gets id 0
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )

    def documents() -> Iterator[str]:
        for source in args.files:
            yield from read_documents(source, text_key=args.text_key, split=args.split)

    kept = documents()
    if args.holdout:
        kept = head(kept, bytes_before_holdout(documents(), args.holdout))
    tokenizer.train_from_iterator(kept, trainer)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, tokenizer.to_str(pretty=True))
    size = tokenizer.get_vocab_size()
    note = "" if size == args.vocab_size else " (the text has no more pairs to merge)"
    print(f"{args.out}: {size} ids{note}, {time.perf_counter() - start:.1f} seconds")


if __name__ == "__main__":
    run(main)
