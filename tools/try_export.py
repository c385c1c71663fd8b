"""Load an export with plain transformers, as its users will, and print a sample of text."""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="an export of tools/convert.py to-hf")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--max-new-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the modeling file that the export carries (read it first)",
    )
    args = parser.parse_args()
    config = json.loads((Path(args.folder) / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config and not args.trust_remote_code:
        module = config["auto_map"]["AutoModelForCausalLM"].partition(".")[0]
        parser.error(
            f"{args.folder}: carries a modeling file, {module}.py; read it, then give "
            "--trust-remote-code to run it"
        )

    torch.manual_seed(args.seed)
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(args.folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(args.folder, **trust).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"],
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
    )
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
