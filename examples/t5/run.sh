#!/usr/bin/env bash
# Pre-trains a T5 on your own text: see README.md beside this file.
#   examples/t5/run.sh TEXT WORK_FOLDER [flags of train.py]
# TEXT is .jsonl or .txt, a file or a folder. TOKENS is the size of the vocabulary, FORM is megatron or public,
# WORKERS is how many processes tokenise, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: run.sh TEXT WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
text=$(realpath "$1")
mkdir -p "$2"
cd "$2"
shift 2

# 1. A vocabulary of word pieces in lower case, with sentinels.
[ -e vocab.txt ] || "$python" "$root/tools/train_tokenizer.py" --input "$text" --tokenizer-type WordPiece \
  --vocab-size "${TOKENS:-30522}" --extra-ids 100 --tokenizer-output-path vocab.txt

# 2. Token files, a sentence an item.
[ -e tokens/text_text_sentence.idx ] || "$python" "$root/tools/preprocess_data.py" --input "$text" --split-sentences \
  --output-prefix tokens/text --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt --workers "${WORKERS:-$(nproc)}"

# 3. Training. A run that was stopped goes on from its last checkpoint when this script is called again.
form=${FORM:-megatron}
files=("$root/examples/t5/train.yml" "$root/examples/t5/$form.yml")
again=()
[ ! -e checkpoints/latest ] || again=(--load checkpoints)
"$python" "$root/deepy.py" "$root/train.py" "${files[@]}" "$@" "${again[@]}"

# 4. What the model puts in place of the sentinels of some prompts.
[ -e prompts.txt ] || printf '%s\n' 'the value of <extra_id_0> is returned.' 'a list of <extra_id_0> and their names.' > prompts.txt
"$python" "$root/deepy.py" "$root/generate.py" "${files[@]}" "$@" --load checkpoints --sample-input-file prompts.txt \
  --sample-output-file answers.jsonl --maximum-tokens 16

# 5. The last checkpoint for transformers, which has no class for Megatron's form.
[ "$form" = public ] || exit 0
rm -rf trained
"$python" "$root/tools/convert_to_hf.py" --input-dir checkpoints --output-dir trained
