"""The main path with real commands: from text to a release, with a SIGTERM on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "data_prep/sample/shakespeare.txt"
CONFIG = "tiny/xlstm.yaml"
PROMPTS = ["ROMEO.", "The king"]


class Commands:
    """Runs this repository's commands in a folder, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bin_folder = Path(sys.executable).parent
        self.env = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def popen(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: object, code: int = 0, **environment: str) -> str:
        process = self.popen(*words, **environment)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == code, output
        return output

    def python(self, script: str, *words: object, code: int = 0, **environment: str) -> str:
        return self(sys.executable, ROOT / script, *words, code=code, **environment)

    def torchrun(self, *words: object) -> subprocess.Popen[str]:
        options = ("--standalone", "--nproc-per-node", 2, "--", "--config", CONFIG)
        return self.popen(ROOT / "launch/torchrun.sh", *options, *words)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    commands = Commands(tmp_path_factory.mktemp("main path"))
    (commands.folder / "text.txt").write_text(TEXT.read_text()[:120_000])
    commands.python(
        "data_prep/tokenize.py", "text.txt", "--tokenizer", "byte", "--holdout", 0.05,
        "--out", "data/tiny",
    )  # fmt: skip
    return commands


@pytest.fixture(scope="module")
def run_folder(commands: Commands) -> Path:
    """Train on two ranks, with a SIGTERM to the launcher on the way."""
    run = commands.folder / "runs/tiny_xlstm"
    first = commands.torchrun()
    wait_for_step(run / "metrics.jsonl", 2, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    stopped = json.loads((run / "status.json").read_text())
    # Between the signal and the flag the run may have ended on a very slow machine.
    assert (first.returncode, stopped["state"]) == (75, "preempted"), output
    assert 2 <= stopped["step"] < 12
    second = commands.torchrun()
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
    # A process of its own, which must not need megarec.
    script = """
import json, sys
sys.modules["megarec"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *prompts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    texts.append(tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0]))
print(json.dumps([type(model).__name__, texts]))
"""
    output = commands(sys.executable, "-c", script, export, *PROMPTS)
    name, texts = json.loads(output.splitlines()[-1])
    assert name == "xLSTMForCausalLM"
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = ("--temperature", 0, "--max-new-tokens", 24)
    for checkpoint in (run_folder, export):
        ours = commands.python("pretrain/generate.py", "--checkpoint", checkpoint, *words, *options)
        assert ours.split("\n" + "-" * 40 + "\n")[:2] == texts


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
