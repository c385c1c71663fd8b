#!/usr/bin/env bash
# From a transformer to a hybrid, on two CPU cores in some minutes: train a small transformer, rank its
# attention layers, replace half of them by Mamba-2 layers that start from the attention (MIL), distil
# the hybrid from the transformer; beside it the same from random mixers. What is there already is
# not made again: delete runs/distill_* to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
data=data/quickstart
layout='*MM*'
train() { torchrun --standalone --nproc-per-node 2 pretrain/train.py --config "$@"; }
evaluate() { python pretrain/evaluate.py --data $data/valid --tokenizer $data-tokenizer.json --seq-len 256 --checkpoint "$1"; }

[[ -f $data/valid/manifest.json ]] || { echo "no $data: run 'make train' first" >&2; exit 2; }

echo "== the teacher, a transformer"
train distill/teacher.yaml
python tools/layer_importance.py --checkpoint runs/distill_teacher --out runs/distill_teacher/plots/layer_importance --force

for init in mil random; do
    echo "== layers $layout (M: Mamba-2, *: attention), new mixers from $init"
    hybrid=runs/distill_hybrid_$init
    [[ -d $hybrid ]] || python tools/convert.py hybridize --hf runs/distill_teacher --layout "$layout" --init $init --out $hybrid
    train distill/student.yaml name=distill_$init train.init_from=$hybrid
done

echo
echo "held out                     (teacher; then hybrids before and after distillation)"
for run in teacher hybrid_mil mil hybrid_random random; do
    printf '%-28s' "$run"
    evaluate runs/distill_$run
done
