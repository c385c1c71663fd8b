"""tools/convert.py, both ways, as a command."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from conversion.tiny_models import (
    assert_same_weights,
    random_model,
    run_config,
    tiny_config,
    write_run,
)
from safetensors.torch import load_file

from megarec.config.model import ModelConfig
from megarec.conversion import export_hf, load_initial_weights, load_model
from megarec.conversion.model_card import read_training_record
from megarec.data.tokenizer import EOD_TOKEN, load_tokenizer
from megarec.models import build_model

ROOT = Path(__file__).parents[2]


def convert(*args: object, code: int = 0) -> str:
    """Run the command and return what it prints, on stderr where it fails."""
    done = subprocess.run(
        [sys.executable, "tools/convert.py", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def convert_here(*args: object) -> None:
    """Run the command in this process; errors are raised."""
    main = runpy.run_path(str(ROOT / "tools/convert.py"))["main"]
    with patch.object(sys, "argv", ["convert.py", *map(str, args)]):
        main()


def test_there_and_back(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    run = write_run(tmp_path / "tiny", model)
    convert("to-hf", "--checkpoint", run, "--out", tmp_path / "hf", "--license", "apache-2.0")
    assert "license: apache-2.0\n" in (tmp_path / "hf/README.md").read_text()
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 256

    printed = convert("from-hf", "--hf", tmp_path / "hf", "--out", tmp_path / "imported")
    assert f"train.init_from={tmp_path / 'imported'}" in printed
    section = yaml.safe_load((tmp_path / "imported/model.yaml").read_text())["model"]
    assert ModelConfig.model_validate(section) == model.config
    assert_same_weights(load_model(tmp_path / "imported")[0], model)
    fresh = build_model(model.config)
    load_initial_weights(fresh, tmp_path / "imported")
    assert_same_weights(fresh, model)

    again = ("--out", tmp_path / "again", "--model-type", "xlstm")
    convert("to-hf", "--checkpoint", tmp_path / "imported", *again)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "again" / name).read_text()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    lines = convert("to-hf", "--checkpoint", tmp_path, "--out", tmp_path / "out", code=2)
    assert lines.count("\n") == 1 and lines.startswith("error: ") and "run folder" in lines


def test_card_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(tiny_config()))
    metrics = [
        {"step": 0, "valid/text/loss": 6.0, "valid/text/bits_per_byte": None},
        {"step": 10, "loss": 3.25, "bits_per_byte": 2.5},
        {"step": 10, "valid/text/loss": 3.5, "valid/text/bits_per_byte": 2.75},
        {"step": 20, "loss": 9.0, "bits_per_byte": 9.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run / "plots").mkdir()
    (run / "plots/loss.png").write_bytes(b"picture")
    model, config = load_model(run)
    record = read_training_record(run / "checkpoints/step_00000010", config)
    export_hf(model, tmp_path / "out", load_tokenizer("byte"), record=record)

    card = (tmp_path / "out/README.md").read_text()
    assert "# tiny\n" in card and "![Loss over training](loss.png)" in card
    assert (tmp_path / "out/loss.png").read_bytes() == b"picture"
    for row in (
        "| tokens | 320 |",
        "| steps | 10 of 10 |",
        "| last training step: loss (nats per token) | 3.2500 |",
        "| last training step: bits per byte | 2.5000 |",
        "| held-out data, text: loss (nats per token) | 3.5000 |",
        "| held-out data, text: bits per byte | 2.7500 |",
    ):
        assert row in card
    recipe = yaml.safe_load(card.split("```yaml\n")[-1].split("```")[0])
    assert recipe == run_config(model.config).model_dump(mode="json")
    # data.bos is eod: the tokenizer of the export puts it before a text, as the loader did.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == f"{EOD_TOKEN}a"
