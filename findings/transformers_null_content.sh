#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0, apply_chat_template: a message field that is null, as `content` is in an assistant turn
# that only calls tools, reaches the template as null in release 4. Release 5 drops the field before it renders, so that a
# template which asks `content is none` and else joins texts fails where release 4 rendered.
# Seen: 4.57.6 prints "NONE|", 5.23.0 an UndefinedError. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/check.py" <<'PY'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
template = "{% for m in messages %}{% if m['content'] is none %}NONE{% else %}{{ m['content'] + '' }}{% endif %}|{% endfor %}"
try:
    print(tokenizer.apply_chat_template([{"role": "assistant", "content": None}], chat_template=template, tokenize=False))
except Exception as fault:
    print(type(fault).__name__)
PY
for release in 4.57.6 5.23.0; do
  python3 -m venv "$work/$release"
  "$work/$release/bin/pip" install --quiet --disable-pip-version-check "transformers==$release" jinja2==3.1.6
done
four=$("$work/4.57.6/bin/python" "$work/check.py" 2>/dev/null)
five=$("$work/5.23.0/bin/python" "$work/check.py" 2>/dev/null)
echo "4.57.6: $four"
echo "5.23.0: $five"
[ "$four" = "NONE|" ] && [ "$five" = "UndefinedError" ]
