"""Tokenizers: byte ids, round trips, literal special tokens, foreign files, bad files."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarec.data.tokenizer import Tokenizer, load_tokenizer
from megarec.errors import UserError

BYTE = load_tokenizer("byte")


@given(st.text())
def test_byte_ids_are_the_utf8_bytes(text: str) -> None:
    assert BYTE.encode(text) == list(text.encode())
    assert BYTE.decode(BYTE.encode(text)) == text


def test_byte_vocabulary() -> None:
    assert (BYTE.vocab_size, BYTE.eod_id, BYTE.name) == (257, 256, "byte")
    assert BYTE.decode([72, 105, 256]) == "Hi<|endoftext|>"


def test_spelled_special_token_is_text() -> None:
    assert BYTE.encode("<|endoftext|>") == list(b"<|endoftext|>")
    assert BYTE.encode_batch(["<|endoftext|>", ""]) == [list(b"<|endoftext|>"), []]


def foreign(path: Path, special: str = "</s>", **extra: object) -> Path:
    """Write a word-level tokenizer.json with a gap in its ids."""
    text = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 9,
                "content": special,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, special: 9}, "unk_token": "a"},
    }
    path.write_text(json.dumps(text | extra))
    return path


def test_foreign_padding_and_truncation_are_off(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "b",
    }
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(foreign(tmp_path / "t.json", padding=padding, truncation=cut))
    assert tokenizer.encode("a b a") == [0, 1, 0]
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.name) == (10, 9, "t.json")
    assert tokenizer.hash == load_tokenizer(foreign(tmp_path / "plain.json")).hash


def test_hash_tells_tokenizers_apart(tmp_path: Path) -> None:
    one, other = foreign(tmp_path / "1.json"), foreign(tmp_path / "2.json", special="<eos>")
    assert len({load_tokenizer(path).hash for path in ("byte", one, other)}) == 3
    assert load_tokenizer("byte").hash == BYTE.hash


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*gone.json"):
        load_tokenizer(tmp_path / "gone.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(broken)
    with pytest.raises(UserError, match=r"no end-of-text token.*got \[MASK\]"):
        load_tokenizer(foreign(tmp_path / "t.json", special="[MASK]"))


def test_exports_to_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    exported = PreTrainedTokenizerFast(tokenizer_object=BYTE.backend, eos_token="<|endoftext|>")
    assert exported("Hi")["input_ids"] == [72, 105]
    assert isinstance(BYTE, Tokenizer) and exported.eos_token_id == BYTE.eod_id
