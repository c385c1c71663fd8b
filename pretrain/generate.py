"""Generate text from a run, a step folder or an export, in memory that does not grow."""

import argparse
from pathlib import Path

from megarec.cli import run
from megarec.conversion.load import find_tokenizer, load_model
from megarec.device import select_device
from megarec.generation import Sampling, generate


def main() -> None:
    """Parse the command line, decode the prompts as one batch, print the texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="a run, a step folder or an HF folder")
    add("--prompt", action="append", required=True, help="may be given several times")
    add("--max-new-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    add("--top-k", type=int)
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--tokenizer", help="'byte' or a tokenizer.json (default: that of the checkpoint)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    model, config = load_model(args.checkpoint, select_device(args.device))
    tokenizer = find_tokenizer(args.checkpoint, config, args.tokenizer)
    # An empty prompt, or a model that reads each document behind an EOD, starts with that token.
    always = config is not None and config.data.bos == "eod"
    encoded = [tokenizer.encode(prompt) for prompt in args.prompt]
    prompts = [[tokenizer.eod_id, *ids] if always or not ids else ids for ids in encoded]
    rows = generate(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        eod_id=tokenizer.eod_id,
    )
    for prompt, ids, row in zip(args.prompt, encoded, rows, strict=True):
        # Decoded together: a character may be split between prompt and continuation.
        print(tokenizer.decode(ids + row) if prompt else tokenizer.decode(row))
        if len(rows) > 1:
            print("-" * 40)


if __name__ == "__main__":
    run(main)
