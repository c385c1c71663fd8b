"""Tokenizer files of an export, for transformers' AutoTokenizer."""

import json
from pathlib import Path

from megarec.data.tokenizer import Tokenizer
from megarec.errors import UserError


def token_ids(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, int | None]:
    """Return bos_token_id, eos_token_id and pad_token_id: the end-of-document id, or None.

    One token ends a document and starts the next. None is written too: left out, transformers
    would put ids of its own. Raises UserError when the tokenizer's ids exceed the vocabulary.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer '{tokenizer.name}': {tokenizer.vocab_size} tokens, but the model has "
            f"vocab_size={vocab_size}; give the tokenizer that it was trained with"
        )
    eod_id = None if tokenizer is None else tokenizer.eod_id
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eod_id)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, add_bos: bool | None) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    The tokenizer of the export adds to a text what the data loader added in training: with
    `add_bos` the end-of-document token in front (`data.bos: eod`), without it nothing. None, where
    training is not known, leaves what the tokenizer's own file adds. There is no padding token:
    not all recurrent classes of transformers ignore padding.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_str(tokenizer.backend.to_str())
    eod = backend.id_to_token(tokenizer.eod_id)
    if add_bos:
        backend.post_processor = TemplateProcessing(
            single=[eod, "$A"], pair=[eod, "$A", "$B"], special_tokens=[(eod, tokenizer.eod_id)]
        )
    elif add_bos is False:
        backend.post_processor = None
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
