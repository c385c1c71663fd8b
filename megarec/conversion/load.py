"""Model weights without a training state: from a run, a step folder or a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from megarec.checkpoint import dcp
from megarec.checkpoint.resolve import resolve_checkpoint
from megarec.config.loader import config_errors, read_yaml, validate_config
from megarec.config.model import ModelConfig
from megarec.config.schema import Config
from megarec.conversion.hf import check_tensors, import_hf, is_hf_folder
from megarec.data.tokenizer import Tokenizer, load_tokenizer
from megarec.errors import UserError
from megarec.models.backbone import Backbone
from megarec.parallel.apply import assign_shard

TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "model.yaml"
"""What an imported run folder has in place of config.yaml: a mapping of the model section only."""


def load_model(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[Backbone, Config | None]:
    """Load a model in float32, whole, in one process.

    Args:
        path: a run folder (its newest sound checkpoint), a step folder, or a folder in Hugging
            Face format.
        device: where it shall live.

    Returns:
        The model in eval mode, and the config of its run; None where there is no run.

    Raises:
        UserError: nothing to load there, a damaged file, or tensors of another model.
    """
    path = Path(path)
    if is_hf_folder(path):
        model_config, tensors = import_hf(path)
        model = _empty_model(model_config, device)
        _assign(model, tensors)
        return model.eval(), None
    step = resolve_checkpoint(path)
    model_config, config = _read_configs(step.resolve().parents[1])
    model = _empty_model(model_config, device)
    dcp.read(step, dcp.model_tensors(model), partial=True)
    return model.eval(), config


def read_weights(path: Path | str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model section and the whole parameters of a checkpoint, on the CPU.

    Path and errors as for `load_model`; a folder in Hugging Face format keeps its dtypes.
    """
    path = Path(path)
    if is_hf_folder(path):
        return import_hf(path)
    model, _ = load_model(path)
    return model.config, {name: p.detach() for name, p in model.named_parameters()}


def read_model_config(path: Path | str) -> ModelConfig:
    """Return the model section of a checkpoint; path and errors as for `load_model`."""
    path = Path(path)
    if is_hf_folder(path):
        return import_hf(path)[0]
    return _read_configs(resolve_checkpoint(path).resolve().parents[1])[0]


def find_tokenizer(path: Path, config: Config | None, wanted: str | None = None) -> Tokenizer:
    """Return the tokenizer that goes with a checkpoint.

    Args:
        path: as for `load_model`.
        config: what `load_model` returned for it.
        wanted: `byte` or a tokenizer.json that overrides the checkpoint's own.

    Raises:
        UserError: the checkpoint names none, or it cannot be read.
    """
    if wanted is None and config is not None:
        wanted = config.tokenizer.path
    if wanted is None:
        folder = path if is_hf_folder(path) else resolve_checkpoint(path, "size").parents[1]
        if not (folder / TOKENIZER_FILE).is_file():
            raise UserError(f"{folder}: has no {TOKENIZER_FILE}; name one with --tokenizer")
        wanted = str(folder / TOKENIZER_FILE)
    return load_tokenizer(wanted)


def load_initial_weights(model: Backbone, path: Path) -> None:
    """Write weights into a model in place; into a sharded one each rank writes its shards.

    Collective where there is a process group. Values are converted to the dtype of the model.

    Args:
        model: whole, or what a rank holds on any mesh.
        path: as for `load_model`.

    Raises:
        UserError: as for `load_model`, with the first ten mismatches, before anything changes.
    """
    if is_hf_folder(path):
        _, tensors = import_hf(path)
        # A pipeline's rank has some of the layers only.
        with torch.device("meta"):
            whole = Backbone(model.config)
        check_tensors(str(path), tensors, dict(whole.named_parameters()))
        _assign(model, tensors)
    else:
        dcp.read(resolve_checkpoint(path), dcp.model_tensors(model), partial=True)


def _empty_model(config: ModelConfig, device: torch.device | str) -> Backbone:
    with torch.device("meta"):
        model = Backbone(config)
    return model.to_empty(device=device)


@torch.no_grad()
def _assign(model: Backbone, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assign_shard(parameter, tensors[name])


def _read_configs(run: Path) -> tuple[ModelConfig, Config | None]:
    path = run / "config.yaml"
    if path.is_file():
        config = validate_config(read_yaml(path), str(path))
        return config.model, config
    path = run / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{run}: has neither config.yaml nor {MODEL_FILE}; expected a run folder")
    model = read_yaml(path).get("model", {})
    try:
        return ModelConfig.model_validate(model), None
    except ValidationError as error:
        raise UserError(*config_errors(error, model, ModelConfig, str(path))) from None
