#!/usr/bin/env bash
# Trains a retriever on the docstrings of Python and measures it: see README.md beside this file.
#   examples/ict/run.sh WORK_FOLDER [flags of train.py]
# TOKENS is the size of the vocabulary, RANKS how many processes or GPUs train, PYTHON the interpreter.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: run.sh WORK_FOLDER [--KEY VALUE ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/examples/ict
python=${PYTHON:-$root/.venv/bin/python}
ranks=(--num-gpus "${RANKS:-2}")
mkdir -p "$1"
cd "$1"
shift

# 1. Passages, questions, and how often BM25 finds the passage of a question.
[ -e documents.jsonl ] || "$python" "$here/make_corpus.py" .

# 2. A vocabulary, and token files of sentences and of titles.
[ -e vocab.txt ] || "$python" "$root/tools/train_tokenizer.py" --input documents.jsonl --tokenizer-type WordPiece \
  --vocab-size "${TOKENS:-2000}" --tokenizer-output-path vocab.txt
[ -e tokens/text_title_sentence.idx ] || "$python" "$root/tools/preprocess_data.py" --input documents.jsonl \
  --json-keys text title --split-sentences --output-prefix tokens/text --tokenizer-type BertWordPieceLowerCase \
  --vocab-file vocab.txt

# 3. Pre-training by the inverse cloze task, then tuning on questions. A run that was stopped goes on where it was.
train() {  # CONFIG SAVE [flags]
  local config=$1 save=$2 again=()
  shift 2
  [ ! -e "$save/latest" ] || again=(--load "$save")
  "$python" "$root/deepy.py" "$root/train.py" "$here/model.yml" "$here/$config" "${ranks[@]}" "${again[@]}" "$@"
}
train ict.yml pretrained "$@"
train dpr.yml tuned "$@"

# 4. Both forms of the corpus, docstrings as they are and without the questions, embedded and searched by both models.
for model in pretrained tuned; do
  for corpus in passages rest; do
    files=("$here/model.yml" "$here/dpr.yml" "${ranks[@]}" --load "$model" --pretrained-checkpoint null
      --evidence-data-path "$corpus.tsv" --embedding-path "embeddings/$model-$corpus" --log-dir "logs/$model-$corpus")
    rm -rf "embeddings/$model-$corpus"
    "$python" "$root/deepy.py" "$root/tools/embed_passages.py" "${files[@]}" "$@"
    "$python" "$root/deepy.py" "$root/tools/search_passages.py" "${files[@]}" --qa-data '[test.jsonl]' "$@"
  done
done

# 5. The encoders of questions and passages for transformers.
rm -rf trained
"$python" "$root/tools/convert_to_hf.py" --input-dir tuned --output-dir trained
