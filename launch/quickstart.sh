#!/usr/bin/env bash
# Real text to a released model, on two CPU cores in a few minutes: tokenise, train, convert, sample.
# A run that was stopped goes on where it was; delete runs/quickstart to begin again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
data=data/quickstart
run=runs/quickstart

if [[ ! -f $data/valid/manifest.json ]]; then
    echo "== tokenising data_prep/sample/shakespeare.txt (the last 5% is held out)"
    python data_prep/tokenize.py data_prep/sample/shakespeare.txt \
        --tokenizer byte --holdout 0.05 --out $data
fi

echo "== training: torchrun --nproc-per-node 2 pretrain/train.py --config quickstart.yaml"
torchrun --standalone --nproc-per-node 2 pretrain/train.py --config quickstart.yaml

echo "== converting to Hugging Face format"
python tools/convert.py to-hf --checkpoint $run --out $run/export --overwrite

echo "== loading it with transformers.AutoModelForCausalLM"
python tools/try_export.py $run/export --prompt "ROMEO."

cat <<END

where things lie
  shards        $data/{train,valid}
  checkpoints   $run/checkpoints
  metrics       $run/metrics.jsonl
  loss curve    $run/plots/loss.png
  release       $run/export  (model card: README.md)
END
