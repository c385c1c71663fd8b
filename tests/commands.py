"""Runs this repository's commands as a user would: one process each, in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "data_prep/sample/shakespeare.txt"
PROMPTS = ["ROMEO.", "The king"]
NEW_TOKENS = 24

# A process of its own, which must not need megarec. Code is run only where an export carries it.
TRANSFORMERS = """
import json, sys
sys.modules["megarec"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
new_tokens, prompts, *folders = sys.argv[1:]
results = []
for folder in folders:
    carries_code = "auto_map" in json.load(open(folder + "/config.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=carries_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=carries_code)
    texts = []
    for prompt in json.loads(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=int(new_tokens), do_sample=False)
        texts.append(tokenizer.decode(new[0]))
    results.append([type(model).__name__, texts])
print(json.dumps(results))
"""


class Commands:
    """Runs commands in a folder, with text prepared as the tiny recipes expect it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bin_folder = Path(sys.executable).parent
        self.env = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
        }
        (folder / "text.txt").write_text(TEXT.read_text()[:120_000])
        self.python(
            "data_prep/tokenize.py", "text.txt", "--tokenizer", "byte", "--holdout", 0.05,
            "--out", "data/tiny",
        )  # fmt: skip

    def popen(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command; its two outputs are one pipe."""
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: object, code: int = 0, **environment: str) -> str:
        """Run a command, which must exit with `code`; returns what it printed."""
        process = self.popen(*words, **environment)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == code, output
        return output

    def python(self, script: str, *words: object, code: int = 0, **environment: str) -> str:
        """Run a script of the repository."""
        return self(sys.executable, ROOT / script, *words, code=code, **environment)

    def torchrun(self, config: str, *words: object) -> subprocess.Popen[str]:
        """Start training on two ranks."""
        options = ("--standalone", "--nproc-per-node", 2, "--", "--config", config)
        return self.popen(ROOT / "launch/torchrun.sh", *options, *words)

    def generate(self, checkpoint: Path) -> list[str]:
        """Continue the prompts greedily; returns prompts and continuations."""
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        options = ("--temperature", 0, "--max-new-tokens", NEW_TOKENS)
        output = self.python("pretrain/generate.py", "--checkpoint", checkpoint, *words, *options)
        return output.split("\n" + "-" * 40 + "\n")[: len(PROMPTS)]

    def generate_with_transformers(self, *exports: Path) -> list[tuple[str, list[str]]]:
        """Do so without megarec; returns each export's class and texts."""
        prompts = json.dumps(PROMPTS)
        output = self(sys.executable, "-c", TRANSFORMERS, NEW_TOKENS, prompts, *exports)
        return [(name, texts) for name, texts in json.loads(output.splitlines()[-1])]
