"""Run by test_other_tools.py in a process that has datatrove: `SCRIPT TEXTS.jsonl TOKENIZER.json FOLDER`.

Writes FOLDER/00000_theirs.bin and .idx with datatrove's own Megatron writer.
"""

import json
import sys
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.tokens import MegatronDocumentTokenizer


def main(texts, tokenizer, folder):
    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    documents = (Document(text=json.loads(line)["text"], id=str(number)) for number, line in enumerate(lines))
    step = MegatronDocumentTokenizer(output_folder=folder, save_filename="theirs", tokenizer_name_or_path=tokenizer)
    step.run(documents, rank=0, world_size=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
