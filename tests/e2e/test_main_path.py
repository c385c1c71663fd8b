"""The main path with real commands: from text to a release, with a SIGTERM on the way."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import Commands

CONFIG = "tiny/xlstm.yaml"


@pytest.fixture(scope="module")
def run_folder(commands: Commands) -> Path:
    """Train on two ranks, with a SIGTERM to the launcher on the way."""
    run = commands.folder / "runs/tiny_xlstm"
    first = commands.torchrun(CONFIG)
    wait_for_step(run / "metrics.jsonl", 2, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    stopped = json.loads((run / "status.json").read_text())
    # Between the signal and the flag the run may have ended on a very slow machine.
    assert (first.returncode, stopped["state"]) == (75, "preempted"), output
    assert 2 <= stopped["step"] < 12
    second = commands.torchrun(CONFIG)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    return run


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step}, "loss"' in metrics.read_text():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


def test_the_run_resumed_where_it_was(run_folder: Path) -> None:
    records = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    bits = [r["valid/shakespeare/bits_per_byte"] for r in records if "valid/shakespeare/loss" in r]
    assert bits[-1] < bits[0] - 1
    assert json.loads((run_folder / "status.json").read_text())["state"] == "done"
    assert (run_folder / "plots/loss.png").exists()


def test_release_loads_in_plain_transformers(commands: Commands, run_folder: Path) -> None:
    export = run_folder / "export"
    commands.python("tools/convert.py", "to-hf", "--checkpoint", run_folder, "--out", export)
    card = (export / "README.md").read_text()
    assert "tiny_xlstm" in card and "loss.png" in card
    ((name, texts),) = commands.generate_with_transformers(export)
    assert name == "xLSTMForCausalLM"
    for checkpoint in (run_folder, export):
        assert commands.generate(checkpoint) == texts


def test_evaluate_gives_the_loss_of_training(commands: Commands, run_folder: Path) -> None:
    output = commands.python(
        "pretrain/evaluate.py", "--checkpoint", run_folder, "--max-samples", 16, "--json"
    )
    result = json.loads(output.splitlines()[-1])["shakespeare"]
    records = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines()]
    trained = [r["valid/shakespeare/loss"] for r in records if "valid/shakespeare/loss" in r][-1]
    assert result["loss"] == pytest.approx(trained, rel=1e-5)


def test_bad_input_is_one_line_and_exit_code_2(commands: Commands, run_folder: Path) -> None:
    train = ("pretrain/train.py", "--config", CONFIG)
    cases = {
        r"optimizer.lrr=3: unknown key; did you mean 'lr'\?": (*train, "optimizer.lrr=3"),
        r"256 is not below model.vocab_size=200": (*train, "model.vocab_size=200", "name=other"),
        r"micro_batch_size=8 does not divide": (*train, "train.micro_batch_size=8", "name=other",
                                           "train.global_batch_size=12"),
        r"no such file .* tiny/xlstm.yaml": ("pretrain/train.py", "--config", "tiny/xlstn.yaml"),
        r"expected a run folder": ("pretrain/generate.py", "--checkpoint", "nowhere",
                                   "--prompt", "a"),
        r"steps: 12 -> 13": (*train, "train.steps=13"),
    }  # fmt: skip
    for expected, words in cases.items():
        output = commands.python(*words, code=2)
        assert re.search(expected, output), output
        assert all(line.startswith("error: ") for line in output.splitlines())
    assert not (commands.folder / "runs/other").exists()


def test_dry_run_needs_no_data(commands: Commands) -> None:
    output = commands.python("pretrain/train.py", "--config", "xlstm_7b.yaml", "--dry-run")
    assert output.startswith("parameters: 6,865,424,896\nFLOPs per token: 40.4")
