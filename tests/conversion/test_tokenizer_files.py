"""The exported tokenizer encodes as training did."""

from pathlib import Path

import pytest

from megarec.conversion.tokenizer_files import write_tokenizer
from megarec.data.tokenizer import EOD_TOKEN, Tokenizer, load_tokenizer

TEXT = "To be, or\nnot to be \N{EM DASH} \u00e9"


@pytest.mark.parametrize("add_bos", [False, True])
def test_auto_tokenizer_encodes_the_same(tmp_path: Path, add_bos: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer("byte")
    write_tokenizer(tmp_path, tokenizer, add_bos=add_bos)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prefix = [tokenizer.eod_id] if add_bos else []
    assert theirs(TEXT)["input_ids"] == prefix + tokenizer.encode(TEXT)
    assert theirs.decode(theirs(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert theirs.bos_token == theirs.eos_token == EOD_TOKEN
    assert theirs.pad_token is None


@pytest.mark.parametrize(("add_bos", "ids"), [(False, [97]), (True, [256, 97]), (None, [97, 256])])
def test_what_a_foreign_file_adds(tmp_path: Path, add_bos: bool | None, ids: list[int]) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    backend = load_tokenizer("byte").backend
    backend.post_processor = TemplateProcessing(
        single=["$A", EOD_TOKEN], special_tokens=[(EOD_TOKEN, 256)]
    )
    write_tokenizer(tmp_path, Tokenizer(backend, "foreign.json"), add_bos=add_bos)
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == ids
