#!/usr/bin/env bash
# Trains a language model that attends to neighbours of its text: see README.md beside this file.
#   examples/retro/run.sh TEXT ENCODER WORK_FOLDER [flags of train.py]
# TEXT is .jsonl or .txt, a file or a folder; ENCODER a folder of transformers. TOKENS is the size of the vocabulary, WORKERS
# is how many processes tokenise, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: run.sh TEXT ENCODER WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
text=$(realpath "$1")
encoder=$(realpath "$2")
mkdir -p "$3"
cd "$3"
shift 3

# 1. A vocabulary.
[ -e tokenizer.json ] || "$python" "$root/tools/train_tokenizer.py" --input "$text" --vocab-size "${TOKENS:-32000}" \
  --tokenizer-output-path tokenizer.json

# 2. Token files.
[ -e tokens/text_text_document.idx ] || "$python" "$root/tools/preprocess_data.py" --input "$text" \
  --output-prefix tokens/text --tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod \
  --workers "${WORKERS:-$(nproc)}"

# 3. Chunks, their embeddings, and the neighbours of every sample of the run; what is there already is not made again.
"$python" "$root/deepy.py" "$root/tools/build_retro_database.py" "$root/examples/retro/train.yml" "$@" \
  --retro-embedder "$encoder"

# 4. Training. A run that was stopped goes on from its last checkpoint when this script is called again.
again=()
[ ! -e checkpoints/latest ] || again=(--load checkpoints)
"$python" "$root/deepy.py" "$root/train.py" "$root/examples/retro/train.yml" "$@" "${again[@]}"

# 5. Text that goes on from its first words, with neighbours of each chunk that is complete.
if [ -e prompts.txt ]; then
  "$python" "$root/deepy.py" "$root/generate.py" "$root/examples/retro/train.yml" "$@" --load checkpoints \
    --retro-embedder "$encoder" --recompute -i prompts.txt -o texts.jsonl
fi
