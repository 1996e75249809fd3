#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: the base of rotary positions does not survive the way from a folder that release 5
# wrote to release 4. Release 5 stores it under `rope_parameters`, which release 4 keeps as an unknown attribute; its own
# `rope_theta` is then the default of the class, and the model computes something else without a word. The other way
# round, and with the older spelling, both agree.
# Seen: 5 -> 4: 10000.0 in place of 500000.0; 4 -> 5 and 4 -> 4: 500000.0. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for release in 4.57.6 5.23.0; do
  python3 -m venv "$work/$release"
  "$work/$release/bin/pip" install --quiet --disable-pip-version-check "transformers==$release"
done
cat > "$work/write.py" <<'PY'
import sys

from transformers import LlamaConfig

five = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
LlamaConfig(**(five if sys.argv[2] == "5" else {"rope_theta": 500000.0})).save_pretrained(sys.argv[1])
PY
cat > "$work/read.py" <<'PY'
import sys

from transformers import AutoConfig

found = AutoConfig.from_pretrained(sys.argv[1])
theirs = getattr(found, "rope_parameters", None)
print(found.rope_theta if sys.argv[2] == "4" else theirs["rope_theta"])
PY

"$work/5.23.0/bin/python" "$work/write.py" "$work/by5" 5 2>/dev/null
"$work/4.57.6/bin/python" "$work/write.py" "$work/by4" 4 2>/dev/null
five_to_four=$("$work/4.57.6/bin/python" "$work/read.py" "$work/by5" 4 2>/dev/null)
four_to_five=$("$work/5.23.0/bin/python" "$work/read.py" "$work/by4" 5 2>/dev/null)
four_to_four=$("$work/4.57.6/bin/python" "$work/read.py" "$work/by4" 4 2>/dev/null)
echo "written by 5.23.0, read by 4.57.6: $five_to_four"
echo "written by 4.57.6, read by 5.23.0: $four_to_five"
echo "written by 4.57.6, read by 4.57.6: $four_to_four"
[ "$five_to_four" = 10000.0 ] && [ "$four_to_five" = 500000.0 ] && [ "$four_to_four" = 500000.0 ]
