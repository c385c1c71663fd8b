"""From raw documents to token shards, in bounded memory and in the order of the input."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarec.data.shards import ShardWriter
from megarec.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Piece:
    """A part of a document, at most 2^18 characters; ``last`` ends the document."""

    text: str
    last: bool


def split_pieces(text: str) -> Iterator[Piece]:
    """Cut a long document into pieces, after a line break where there is one.

    An encoded text takes 100 times its memory, and one text runs on one core. Byte-level tokenizers
    give the same ids for the pieces as for the whole wherever a cut falls before a non-blank
    character.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        stop = text.rfind("\n", start, limit) + 1 or limit
        yield Piece(text[start:stop], last=False)
        start = stop
    yield Piece(text[start:], last=True)


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
    """Yield (ids, UTF-8 bytes) of each document; pieces are encoded in batches, on all cores."""
    parts: list[npt.NDArray[np.int32]] = []
    text_bytes = 0
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            parts.append(np.asarray(ids, dtype=np.int32))
            text_bytes += len(piece.text.encode())
            if piece.last:
                yield np.concatenate(parts), text_bytes
                parts, text_bytes = [], 0


def _batches(documents: Iterable[str]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for document in documents:
        for piece in split_pieces(document):
            batch.append(piece)
            # One more than its length, so that empty documents fill a batch too.
            characters += len(piece.text) + 1
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def write_documents(documents: Iterable[str], writer: ShardWriter) -> None:
    """Encode documents with the writer's tokenizer and add them to it."""
    for ids, text_bytes in encode_documents(documents, writer.tokenizer):
        writer.add(ids, text_bytes)


def bytes_before_holdout(documents: Iterable[str], holdout: float) -> int:
    """Return where the last share `holdout` of the documents' UTF-8 bytes begins."""
    total = sum(len(text.encode()) for text in documents)
    return total - round(total * holdout)


def head(documents: Iterable[str], cut: int) -> Iterator[str]:
    """Yield what lies in the first ``cut`` bytes of the documents; see ``split_at``."""
    for text, start, stop in _spans(documents):
        if start >= cut:
            return
        yield text if stop <= cut else split_at(text, cut - start)[0]


def tail(documents: Iterable[str], cut: int) -> Iterator[str]:
    """Yield what ``head`` does not."""
    for text, start, stop in _spans(documents):
        if start >= cut:
            yield text
        elif stop > cut:
            yield split_at(text, cut - start)[1]


def split_at(text: str, cut: int) -> tuple[str, str]:
    """Split a text after the last line break in its first ``cut`` bytes, or the first one after.

    Without any line break the first part is the whole text.
    """
    raw = text.encode()
    stop = raw.rfind(b"\n", 0, cut) + 1 or raw.find(b"\n", cut) + 1 or len(raw)
    return raw[:stop].decode(), raw[stop:].decode()


def _spans(documents: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    stop = 0
    for text in documents:
        start, stop = stop, stop + len(text.encode())
        yield text, start, stop
