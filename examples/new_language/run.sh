#!/usr/bin/env bash
# GPT-2 for a new language, from raw text to perplexity: see README.md beside this file.
#   examples/new_language/run.sh TEXT_FOLDER WORK_FOLDER [flags of train.py]
# TOKENS is the size of the vocabulary, WORKERS the processes that tokenise, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: run.sh TEXT_FOLDER WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
text=$(cd "$1" && pwd)
mkdir -p "$2"
cd "$2"
shift 2

# 1. Hold out every 20th file, by the hash of its name: it stays where it is when files are added.
rm -rf split
mkdir -p split/train split/valid
(cd "$text" && find . -name '*.txt' -type f) | LC_ALL=C sort | while IFS= read -r file; do
  hash=$(printf %s "$file" | cksum | cut -d' ' -f1)
  part=train
  [ $((hash % 20)) -ne 0 ] || part=valid
  mkdir -p "split/$part/$(dirname "$file")"
  ln -s "$text/$file" "split/$part/$file"
done
for part in train valid; do
  [ -n "$(find split/$part -name '*.txt')" ] || {
    echo "error: no file of $text fell to the $part part; give more .txt files, a document each" >&2
    exit 2
  }
done
find -L split/valid -name '*.txt' -type f | LC_ALL=C sort | while IFS= read -r file; do cat "$file"; echo; done > valid.txt

# 2. A tokenizer of the language itself, with as many tokens as GPT-2 has.
"$python" "$root/tools/train_tokenizer.py" --input split/train --vocab-size "${TOKENS:-50257}" \
  --tokenizer-output-path tokenizer.json

# 3. Tokens.
for part in train valid; do
  "$python" "$root/tools/preprocess_data.py" --input "split/$part" --output-prefix "tokens/$part" \
    --tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod --workers "${WORKERS:-$(nproc)}"
done

# 4. Training. A run that was stopped goes on from its last checkpoint when this script is called again.
again=()
[ ! -e checkpoints/latest ] || again=(--load checkpoints)
"$python" "$root/deepy.py" "$root/train.py" "$root/examples/new_language/gpt2.yml" "$@" "${again[@]}"

# 5. Perplexity of what was held out, a token and a word; and bits a byte, which vocabularies can be compared by.
for tool in perplexity bits_per_byte; do
  "$python" "$root/deepy.py" "$root/tools/$tool.py" "$root/examples/new_language/gpt2.yml" "$@" --load checkpoints \
    --eval-text valid.txt
done
