"""The model card of an export: what the model is, how it was trained, how to load it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import megarec
from megarec.checkpoint.manager import STATE
from megarec.config.model import ModelConfig
from megarec.config.schema import Config
from megarec.train.hooks.jsonl import read_metrics
from megarec.train.run_folder import RunFolder

METRICS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}

LOAD_WITH_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path{options})
model = AutoModelForCausalLM.from_pretrained(path{options})
inputs = tokenizer("Once upon a time", return_tensors="pt")
output_ids = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output_ids[0], skip_special_tokens=True))
"""
LOAD_ALONE = """\
from transformers import AutoModelForCausalLM

path = "."  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(path{options})
"""
SECURITY = (
    "`trust_remote_code=True` runs `{file}` of this folder on your machine: read it first, as you "
    "would any program (megarec imports the folder without it)."
)


@dataclass(frozen=True)
class TrainingRecord:
    """What a run says of one of its checkpoints.

    Attributes:
        config: of the run.
        step: optimizer steps made.
        tokens: predicted in training so far.
        losses: (name, value) of the last measurements up to this step.
        plot: a picture of the loss curve, if the run drew one.
    """

    config: Config
    step: int
    tokens: int
    losses: list[tuple[str, float]]
    plot: Path | None


def read_training_record(step_folder: Path, config: Config) -> TrainingRecord:
    """Gather the record of a step folder from it and from its run folder."""
    run = RunFolder(step_folder.resolve().parents[1])
    state = json.loads((step_folder / STATE).read_text(encoding="utf-8"))["train"]
    plot = run.plots / "loss.png"
    return TrainingRecord(
        config=config,
        step=state["step"],
        tokens=state["tokens"],
        losses=_last_losses(run.metrics, state["step"]),
        plot=plot if plot.is_file() else None,
    )


def write_model_card(
    folder: Path,
    *,
    title: str,
    config: ModelConfig,
    model_type: str,
    modeling_file: str | None,
    license: str,
    notes: list[str],
    has_tokenizer: bool,
    record: TrainingRecord | None,
) -> None:
    """Write README.md, its front matter valid for the Hub, and copy the loss curve beside it.

    Args:
        folder: of the export.
        title: first heading.
        config: of the model.
        model_type: of transformers.
        modeling_file: that the export carries, if transformers has no class for it.
        license: identifier of the Hub.
        notes: sentences on what users must know.
        has_tokenizer: the export has one.
        record: how the model was trained, if known.
    """
    front_matter = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megarec", model_type],
    }
    load = LOAD_WITH_TOKENIZER if has_tokenizer else LOAD_ALONE
    code, security, options = f"the `{model_type}` class of transformers", "", ""
    if modeling_file is not None:
        code = f"transformers with a modeling file of its own, `{modeling_file}`"
        security = SECURITY.format(file=modeling_file)
        options = ", trust_remote_code=True"
    parts = [
        f"---\n{_yaml(front_matter)}---",
        f"# {title}",
        f"A language model of {config.num_params():,} parameters for {code}, written by megarec "
        f"{megarec.__version__}.",
        f"## Use\n\n```python\n{load.format(options=options)}```",
        security,
        "\n".join(f"- {note}" for note in notes),
        f"## Architecture\n\n{_table(_sizes(config))}",
    ]
    if record is None:
        parts.append(f"```yaml\n{_yaml({'model': config.model_dump(mode='json')})}```")
    else:
        parts.append(f"## Training\n\n{_table(_training(record))}")
        if record.plot is not None:
            shutil.copyfile(record.plot, folder / "loss.png")
            parts.append("![Loss over training](loss.png)")
        recipe = _yaml(record.config.model_dump(mode="json"))
        parts.append(f"## Recipe\n\n```yaml\n{recipe}```")
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _last_losses(metrics: Path, step: int) -> list[tuple[str, float]]:
    """Return the last value of each loss that was logged up to a step, training first."""
    last: dict[str, float] = {}
    for record in read_metrics(metrics) if metrics.is_file() else []:
        if record["step"] <= step:
            last |= {key: value for key, value in record.items() if value is not None}
    names = sorted(key for key in last if key.rpartition("/")[2] in METRICS)
    losses = []
    for name in sorted(names, key=lambda name: "/" in name):
        source, _, metric = name.rpartition("/")
        where = (
            f"held-out data, {source.removeprefix('valid/')}" if source else "last training step"
        )
        losses.append((f"{where}: {METRICS[metric]}", last[name]))
    return losses


def _sizes(config: ModelConfig) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{config.num_params():,}"),
        ("layers", f"{config.num_layers}, blocks {' '.join(config.pattern)}"),
        ("mixers", ", ".join(sorted({mixer.type for mixer in config.mixers}))),
        ("width", f"{config.d_model:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("decoding state after 1,024 tokens", f"{config.state_bytes(1024):,} bytes in float32"),
    ]


def _training(record: TrainingRecord) -> list[tuple[str, str]]:
    train = record.config.train
    return [
        ("tokens", f"{record.tokens:,}"),
        ("steps", f"{record.step:,} of {train.steps:,}"),
        ("batch", f"{train.global_batch_size:,} sequences of {train.seq_len:,} tokens"),
        ("compute precision", record.config.precision.compute),
        *((name, f"{value:.4f}") for name, value in record.losses),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
