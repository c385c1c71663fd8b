#!/usr/bin/env bash
# Real text to a released model, on two CPU cores in a few minutes: tokenise, train, convert, sample.
# A run that was stopped goes on where it was; delete runs/quickstart to begin again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
# glibc gives freed memory back to the kernel, which clears it anew at the next step: keep it.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=67108864
text=data_prep/sample/shakespeare.txt
data=data/quickstart
run=runs/quickstart

if [[ ! -f $data/valid/manifest.json ]]; then
    echo "== tokenising $text (the last 5% is held out, from the tokenizer too)"
    python data_prep/train_tokenizer.py $text --vocab-size 2048 --holdout 0.05 \
        --out $data-tokenizer.json --force
    python data_prep/tokenize.py $text --tokenizer $data-tokenizer.json --holdout 0.05 \
        --out $data --force
fi

echo "== training: torchrun --nproc-per-node 2 pretrain/train.py --config quickstart.yaml"
torchrun --standalone --nproc-per-node 2 pretrain/train.py --config quickstart.yaml

echo "== converting to Hugging Face format"
python tools/convert.py to-hf --checkpoint $run --out $run/export --license cc0-1.0 --overwrite

echo "== loading it with transformers.AutoModelForCausalLM"
python tools/try_export.py $run/export --prompt "ROMEO."

cat <<END

where things lie
  tokenizer     $data-tokenizer.json
  shards        $data/train and $data/valid
  checkpoints   $run/checkpoints
  metrics       $run/metrics.jsonl
  loss curve    $run/plots/loss.png
  release       $run/export  (model card: README.md)
END
