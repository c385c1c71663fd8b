"""Generate text from a run, a step folder or an export, in memory that does not grow."""

import argparse
import sys
import time
from pathlib import Path

from megarec.cli import positive_int, run
from megarec.conversion.load import find_tokenizer, load_model
from megarec.device import select_device
from megarec.errors import UserError
from megarec.generation import Sampling, diffusion_forcing, generate
from megarec.generation.options import parse_halting, parse_sampler
from megarec.models.halting import Halting
from megarec.models.looped import Looped


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
    words = {"nargs": "+", "metavar": ("NAME", "key=value")}
    add = parser.add_argument_group("models with a looped stack").add_argument
    add("--num-recurrences", type=positive_int, help="default: that of the model's config")
    add("--halt", **words, help="a rule for when a token stops iterating: kl threshold=5e-4")
    add("--warm-start", action="store_true", help="iterate from where the last token ended")
    add("--sampler", **words, help="diffusion_forcing: several tokens iterate at once")
    args = parser.parse_args()

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    halting = parse_halting(args.halt) if args.halt else None
    wave = parse_sampler(args.sampler) if args.sampler else None
    if wave is not None and (halting or args.warm_start or len(args.prompt) > 1):
        raise UserError(
            "--sampler diffusion_forcing: takes one --prompt, and neither --halt (it has a "
            "threshold of its own) nor --warm-start"
        )
    model, config = load_model(args.checkpoint, select_device(args.device))
    tokenizer = find_tokenizer(args.checkpoint, config, args.tokenizer)
    # An empty prompt, or a model that reads each document behind an EOD, starts with that token.
    always = config is not None and config.data.bos == "eod"
    encoded = [tokenizer.encode(prompt) for prompt in args.prompt]
    prompts = [[tokenizer.eod_id, *ids] if always or not ids else ids for ids in encoded]
    options = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "eod_id": tokenizer.eod_id,
        "num_recurrences": args.num_recurrences,
    }
    start, looped = time.perf_counter(), isinstance(model.stack, Looped)
    if wave is None:
        counted = halting or (Halting() if looped else None)
        rows = generate(model, prompts, halting=counted, warm_start=args.warm_start, **options)
        mean = counted.mean_steps if counted else 0.0
    else:
        found = diffusion_forcing(model, prompts[0], config=wave, **options)
        rows, mean = [found.ids], found.token_recurrences / max(len(found.ids), 1)
    seconds = time.perf_counter() - start
    for prompt, ids, row in zip(args.prompt, encoded, rows, strict=True):
        # Decoded together: a character may be split between prompt and continuation.
        print(tokenizer.decode(ids + row) if prompt else tokenizer.decode(row))
        if len(rows) > 1:
            print("-" * 40)
    if looped:
        rate = f"{sum(map(len, rows)) / seconds:.1f} tokens a second, prompts included"
        print(f"{rate}; {mean:.2f} recurrences a token", file=sys.stderr)


if __name__ == "__main__":
    run(main)
