"""Load an export with plain transformers, as its users will, and print a sample of text."""

import argparse
import os

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

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, trust_remote_code=args.trust_remote_code
    ).eval()
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
