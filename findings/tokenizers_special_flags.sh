#!/usr/bin/env bash
# tokenizers 0.23.3: Tokenizer.add_special_tokens with a token that the tokenizer already has replaces that token's flags
# (lstrip, rstrip, normalized) by those of the call. Whoever makes sure that a token is special in this way changes what
# a text is encoded to: a mask token that took the blank before it does so no more.
# Seen: lstrip True and ids [0, 3] before, lstrip False and ids [2, 3] after. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$work/check.py" <<'PY'
from tokenizers import AddedToken, Tokenizer, models

tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])


def seen() -> str:
    flags = next(token for token in tokenizer.get_added_tokens_decoder().values() if token.content == "<mask>")
    return f"lstrip {flags.lstrip}, ids {tokenizer.encode('a <mask>').ids}"


before = seen()
tokenizer.add_special_tokens([AddedToken("<mask>", special=True)])
print(f"{before}; {seen()}")
PY
found=$("$work/env/bin/python" "$work/check.py")
echo "$found"
[ "$found" = "lstrip True, ids [0, 3]; lstrip False, ids [2, 3]" ]
