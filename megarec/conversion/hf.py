"""Read and write folders in Hugging Face format; what is special to an architecture is a target."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megarec.checkpoint.atomic import published
from megarec.checkpoint.mismatch import mismatches
from megarec.config.loader import config_errors
from megarec.config.model import ModelConfig
from megarec.conversion.model_card import TrainingRecord, write_model_card
from megarec.conversion.target import target_for_export, target_for_import
from megarec.conversion.tokenizer_files import token_ids, write_tokenizer
from megarec.data.tokenizer import Tokenizer
from megarec.errors import UserError
from megarec.models.backbone import Backbone

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MODELING = Path(__file__).parent / "modeling"
"""The modeling files of targets that transformers has no class for."""

logger = logging.getLogger(__name__)


def is_hf_folder(path: Path) -> bool:
    """Tell whether a folder is in Hugging Face format: it has a config.json."""
    return (path / CONFIG).is_file()


def export_hf(
    model: Backbone,
    folder: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    model_type: str | None = None,
    record: TrainingRecord | None = None,
    license: str = "unknown",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a model that transformers loads without megarec: weights, configs, tokenizer, card.

    Where transformers has no class for the model, the folder carries its modeling file, too. It
    appears whole or not at all. Tensors keep their dtype, bit by bit.

    Args:
        model: whole (not sharded).
        folder: to create.
        tokenizer: written too; its end-of-document token becomes BOS, EOS and padding.
        model_type: of the architecture to write; by default the first that fits.
        record: how the model was trained, for the model card.
        license: identifier of the Hub, such as apache-2.0.
        max_shard_size: of one safetensors file.
        overwrite: replace an earlier export.

    Raises:
        UserError: no architecture of transformers can represent the model (every reason), the
            folder is not empty, or the tokenizer has more tokens than the model.
    """
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    target = target_for_export(model.config, model_type)
    config = target.export_config(model.config)
    config |= token_ids(tokenizer, model.config.vocab_size)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config |= dict.fromkeys(target.dtype_keys, dtype)
    notes = target.notes(model.config)
    if model.config.head.tie_embeddings and not target.can_tie:
        notes.append("Embeddings were tied in training; here `lm_head` is a copy of them.")
    obstacle = target.cache_obstacle(model.config)
    config["use_cache"] = obstacle is None
    if obstacle is not None:
        logger.warning("export: written with use_cache=false: %s", obstacle)
        notes.append(
            f"`use_cache` is off, so generation reads the whole text for each token: {obstacle}."
        )
    generation = {key: config[key] for key in config if key.endswith("_token_id")}
    generation["use_cache"] = config["use_cache"]
    tensors = target.export_tensors(model.config, model.state_dict())
    with _new_export(folder, overwrite) as temporary:
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size)
        _write_json(temporary / CONFIG, config)
        _write_json(temporary / "generation_config.json", generation)
        if target.modeling_file is not None:
            shutil.copyfile(MODELING / target.modeling_file, temporary / target.modeling_file)
        if tokenizer is not None:
            add_bos = None if record is None else record.config.data.bos == "eod"
            write_tokenizer(temporary, tokenizer, add_bos=add_bos)
        write_model_card(
            temporary,
            title=folder.resolve().name if record is None else record.config.name,
            config=model.config,
            model_type=target.model_type,
            modeling_file=target.modeling_file,
            license=license,
            notes=notes,
            has_tokenizer=tokenizer is not None,
            record=record,
        )


def import_hf(folder: Path | str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a model from a folder in Hugging Face format; code that it may hold is never run.

    Returns:
        The model section, and the tensors by own parameter name. They keep their dtype and are
        mapped from the files: memory is taken when they are read, and shared between processes.

    Raises:
        UserError: a file is missing or damaged, an architecture or option that megarec does not
            have, or tensors that do not fit config.json.
    """
    folder = Path(folder)
    path = folder / CONFIG
    hf = _read_json(path)
    target = target_for_import(hf.get("model_type"), str(path))
    try:
        config = target.import_config(hf)
    except ValidationError as error:
        raise UserError(*config_errors(error, hf, ModelConfig, str(path))) from None
    except UserError as error:
        raise UserError(*(f"{path}: {line}" for line in error.lines)) from None
    tensors = _read_tensors(folder)
    try:
        tensors = target.import_tensors(config, tensors)
    except UserError as error:
        raise UserError(*(f"{folder}: {line}" for line in error.lines)) from None
    with torch.device("meta"):
        check_tensors(str(folder), tensors, Backbone(config).state_dict())
    return config, tensors


def check_tensors(where: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError, with the first ten differences, unless names and shapes are the same."""
    problems = mismatches(
        where,
        {name: tensor.shape for name, tensor in found.items()},
        {name: tensor.shape for name, tensor in expected.items()},
    )
    if problems:
        raise UserError(*problems)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX}: expected a mapping weight_map of tensors to files")
        files = sorted(set(weight_map.values()))
    else:
        files = [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / file}: cannot be read as safetensors: {error}; expected {WEIGHTS}, or "
                f"{INDEX} and the files that it names"
            ) from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_export(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the name of `folder` when the block succeeds."""
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: not empty; choose another folder, or pass --overwrite")
        if not is_hf_folder(folder):
            raise UserError(f"{folder}: has no {CONFIG}, so it is no export; it is not replaced")
    with published(folder) as temporary:
        yield temporary
