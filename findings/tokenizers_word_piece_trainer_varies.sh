#!/usr/bin/env bash
# tokenizers 0.23.3: WordPieceTrainer learns other vocabularies from the same text in every run. The pieces of its alphabet
# that go on a word (`##a`) get their ids in an order that differs between processes, and among merges that are equally
# frequent the ids decide. BpeTrainer gives the same vocabulary each time.
# Seen: ten processes, one text: several vocabularies of WordPieceTrainer (sets of pieces, ids left aside), one of
# BpeTrainer. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$work/learn.py" <<'PY'
import hashlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

model, trainer = {
    "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
    "BPE": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer),
}[sys.argv[1]]
tokenizer = Tokenizer(model)
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
words = [f"{first}{second}{third}" for first in "abcdef" for second in "ghijkl" for third in "mnopqr"]
tokenizer.train_from_iterator([" ".join(words)] * 5, trainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False))
print(hashlib.sha256("\n".join(sorted(tokenizer.get_vocab())).encode()).hexdigest()[:12])
PY
for kind in WordPiece BPE; do
  for _ in 1 2 3 4 5 6 7 8 9 10; do "$work/env/bin/python" "$work/learn.py" "$kind"; done | sort -u > "$work/$kind"
  echo "$kind: $(wc -l < "$work/$kind") vocabularies in ten runs"
done
[ "$(wc -l < "$work/WordPiece")" -gt 1 ] && [ "$(wc -l < "$work/BPE")" -eq 1 ]
