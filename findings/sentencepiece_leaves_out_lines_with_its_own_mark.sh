#!/usr/bin/env bash
# sentencepiece 0.2.3: the trainer leaves out every sentence that holds U+2585 (a block element that occurs in progress bars and
# plots), which it uses itself in place of unknown characters. There is a line in its log, and no error: training succeeds.
# Observed: of 200 sentences "zebra quiz jelly" and 200 "a b c d e f" the vocabulary has the letters j, q and z; with the mark in
# each of the first it has none of them.
# Fails if a "z" is learnt in both cases, or in neither.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "${folder}"' EXIT
python3 -m venv "${folder}/venv"
"${folder}/venv/bin/pip" install --quiet --disable-pip-version-check "sentencepiece==0.2.3"
"${folder}/venv/bin/python" - "${folder}" <<'PY'
import sys

import sentencepiece

folder = sys.argv[1]


def letters(sentence):
    """Letters of the vocabulary that is learnt from that sentence and a plain one, each 200 times."""
    path = f"{folder}/text.txt"
    with open(path, "w", encoding="utf-8") as text:
        text.write(f"{sentence}\na b c d e f\n" * 200)
    sentencepiece.SentencePieceTrainer.train(
        input=path, model_prefix=f"{folder}/model", vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")
    return {each for piece in range(model.get_piece_size()) for each in model.id_to_piece(piece)}


plain, marked = letters("zebra quiz jelly"), letters("zebra \u2585 quiz jelly")
print("version", sentencepiece.__version__)
print("letters without the mark:", "".join(sorted(plain & set("abcdefzqj"))))
print("letters with the mark:   ", "".join(sorted(marked & set("abcdefzqj"))))
assert "z" in plain, "the trainer no longer learns this text at all"
assert "z" not in marked, "sentences with the mark are learnt now"
PY
