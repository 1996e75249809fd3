#!/usr/bin/env bash
# Goes on training a LLaMA model of Hugging Face, there and back: see README.md beside this file.
#   examples/continue_llama/run.sh MODEL_FOLDER TEXT WORK_FOLDER [flags of train.py]
# MODEL_FOLDER holds config.json, safetensors and a tokenizer; TEXT is .jsonl or .txt, a file or a folder.
# WORKERS is how many processes tokenise, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: run.sh MODEL_FOLDER TEXT WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
model=$(cd "$1" && pwd)
text=$(realpath "$2")
mkdir -p "$3"
cd "$3"
shift 3

# 1. The weights in our layout, with the model's keys in start/model.yml.
[ -e start/latest ] || "$python" "$root/tools/convert_from_hf.py" --input-dir "$model" --output-dir start

# 2. The text in the model's own tokens, by the tokenizer that model.yml names.
named() { sed -n "s/^$1: *//p" start/model.yml; }
[ -n "$(named tokenizer_type)" ] || { echo "error: $model holds no tokenizer that is understood" >&2; exit 2; }
tokenizer=(--tokenizer-type "$(named tokenizer_type)" --vocab-file "$(named vocab_file)")
[ -z "$(named merge_file)" ] || tokenizer+=(--merge-file "$(named merge_file)")
[ -e tokens/train_text_document.idx ] || "$python" "$root/tools/preprocess_data.py" --input "$text" \
  --output-prefix tokens/train "${tokenizer[@]}" --append-eod --workers "${WORKERS:-$(nproc)}"

# 3. Training: from the converted weights, iteration 0 and a fresh optimizer; called again, from its own last checkpoint.
from=(--load start --finetune true)
[ ! -e checkpoints/latest ] || from=(--load checkpoints)
"$python" "$root/deepy.py" "$root/train.py" start/model.yml "$root/examples/continue_llama/continue.yml" \
  "${from[@]}" "$@"

# 4. Back, with the tokenizer that it came with.
rm -rf trained
"$python" "$root/tools/convert_to_hf.py" --input-dir checkpoints --output-dir trained
