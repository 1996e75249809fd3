#!/usr/bin/env bash
# Trains a model away from what a scorer finds, on text of its own: see README.md beside this file.
#   examples/detoxify/run.sh MODEL.yml SCORER.yml WORK_FOLDER [flags of train.py]
# SAMPLES is the number of texts, LENGTH their longest length [tokens], STEPS the updates, RATE the learning rate, WORKERS
# the processes that tokenise, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: run.sh MODEL.yml SCORER.yml WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
model=$(realpath "$1")
scorer=$(realpath "$2")
mkdir -p "$3"
work=$(cd "$3" && pwd)
shift 3

generate() {  # FILE [flags]: texts from nothing, sampled as the model would continue them
  local file=$1
  shift
  "$python" "$root/deepy.py" "$root/generate.py" "$model" -o "$file" --text-gen-type unconditional \
    --temperature 1.0 --generation-batch-size 32 --num-samples "${SAMPLES:-10000}" --maximum-tokens "${LENGTH:-256}" "$@" > "$file.log"
}

# 1. Texts of the model, and the half of them with the lowest scores.
generate "$work/before.jsonl"
echo "before: $("$python" "$root/tools/filter_texts.py" "$scorer" --input "$work/before.jsonl")"
"$python" "$root/tools/filter_texts.py" "$scorer" --input "$work/before.jsonl" --output "$work/retained.jsonl"

# 2. Token files of these, with the tokenizer that model.yml names.
named() { sed -n "s/^$1: *//p" "$model" | tr -d "\"'"; }
[ -n "$(named tokenizer_type)" ] || { echo "error: $model names no tokenizer_type" >&2; exit 2; }
tokenizer=(--tokenizer-type "$(named tokenizer_type)")
[ -z "$(named vocab_file)" ] || tokenizer+=(--vocab-file "$(named vocab_file)")
[ -z "$(named merge_file)" ] || tokenizer+=(--merge-file "$(named merge_file)")
"$python" "$root/tools/preprocess_data.py" --input "$work/retained.jsonl" --output-prefix "$work/tokens" \
  "${tokenizer[@]}" --append-eod --workers "${WORKERS:-$(nproc)}"

# 3. Training on them, from the model's weights.
adam="{\"type\": \"Adam\", \"params\": {\"lr\": ${RATE:-2.0e-5}, \"betas\": [0.9, 0.95]}}"
"$python" "$root/deepy.py" "$root/train.py" "$model" --finetune true --data-path "$work/tokens_text_document" \
  --split 1,0,0 --eval-iters 0 --save "$work/checkpoints" --checkpoint-factor "${STEPS:-1000}" --log-dir "$work/logs" \
  --train-iters "${STEPS:-1000}" --optimizer "$adam" --lr-decay-style constant --warmup 0.01 "$@"

# 4. The same measure again.
generate "$work/after.jsonl" --load "$work/checkpoints"
echo "after: $("$python" "$root/tools/filter_texts.py" "$scorer" --input "$work/after.jsonl")"
