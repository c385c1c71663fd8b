"""Tokenizers: bytes, built in memory, or any tokenizer.json; each has a hash and an EOD token."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from megarec.errors import UserError

if TYPE_CHECKING:
    import tokenizers

BYTE = "byte"
EOD_TOKEN = "<|endoftext|>"

# What published tokenizers call the token that ends a text, in order of preference.
EOD_NAMES = (EOD_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer:
    """A reversible map between text and ids; `name` is "byte" or the name of its file."""

    def __init__(self, backend: "tokenizers.Tokenizer", name: str) -> None:
        # A foreign file may pad or cut every text; a pretraining corpus must keep all of it.
        backend.no_padding()
        backend.no_truncation()
        # The EOD marks the end of a document: text that merely spells it is ordinary text.
        backend.encode_special_tokens = True
        self.backend = backend
        self.name = name
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.eod_id = _find_eod(backend, name)

    @property
    def hash(self) -> str:
        """The blake2b hash of the tokenizer's canonical JSON, 32 hexadecimal digits."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True)
        return blake2b(canonical.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; runs on all cores (RAYON_NUM_THREADS limits them)."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer "byte", or the one in a tokenizer.json file.

    Raises UserError when the file is missing or is no tokenizer, or has no end-of-text token.
    """
    if path == BYTE:
        return Tokenizer(_byte_backend(), BYTE)
    import tokenizers

    path = Path(path)
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"tokenizer: cannot read '{path}' ({error.strerror}); "
            f"expected '{BYTE}' or the path of a tokenizer.json"
        ) from error
    except ValueError as error:
        raise UserError(f"tokenizer: '{path}' is not a tokenizer.json: {error}") from error
    return Tokenizer(backend, path.name)


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE (256, in byte order).

    Printable Latin-1 characters stand for themselves, the others for U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _byte_backend() -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOD_TOKEN])
    return backend


def _find_eod(backend: "tokenizers.Tokenizer", name: str) -> int:
    special = {
        token.content: id_
        for id_, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    for candidate in EOD_NAMES:
        if candidate in special:
            return special[candidate]
    raise UserError(
        f"tokenizer: '{name}' has no end-of-text token; expected a special token named "
        f"{', '.join(EOD_NAMES)}; got {', '.join(sorted(special)) or 'no special token'}"
    )
