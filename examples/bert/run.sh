#!/usr/bin/env bash
# Pre-trains a BERT on your own text: see README.md beside this file.
#   examples/bert/run.sh TEXT WORK_FOLDER [flags of train.py]
# TEXT is .jsonl or .txt, a file or a folder. TOKENS is the size of the vocabulary, FORM is megatron or modern,
# WORKERS is how many processes tokenise, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: run.sh TEXT WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
text=$(realpath "$1")
mkdir -p "$2"
cd "$2"
shift 2

# 1. A vocabulary of word pieces in lower case.
[ -e vocab.txt ] || "$python" "$root/tools/train_tokenizer.py" --input "$text" --tokenizer-type WordPiece \
  --vocab-size "${TOKENS:-30522}" --tokenizer-output-path vocab.txt

# 2. Token files, a sentence an item.
[ -e tokens/text_text_sentence.idx ] || "$python" "$root/tools/preprocess_data.py" --input "$text" --split-sentences \
  --output-prefix tokens/text --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt --workers "${WORKERS:-$(nproc)}"

# 3. Training. A run that was stopped goes on from its last checkpoint when this script is called again.
form=${FORM:-megatron}
files=("$root/examples/bert/train.yml" "$root/examples/bert/$form.yml")
again=()
[ ! -e checkpoints/latest ] || again=(--load checkpoints)
"$python" "$root/deepy.py" "$root/train.py" "${files[@]}" "$@" "${again[@]}"

# 4. The last checkpoint for transformers, which has no class for the modern form.
[ "$form" = megatron ] || exit 0
rm -rf trained
"$python" "$root/tools/convert_to_hf.py" --input-dir checkpoints --output-dir trained
