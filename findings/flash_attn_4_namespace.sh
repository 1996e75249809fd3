#!/usr/bin/env bash
# flash-attn-4 4.0.0b36: the package puts its code into flash_attn/cute without a flash_attn/__init__.py, so that with it
# alone `importlib.util.find_spec("flash_attn")` finds a namespace package, and `import flash_attn` works. Whoever asks in
# this way whether flash-attn 2 is there gets yes, and then finds no flash_attn_func in it. The spec of the real package
# has an origin (a file), the namespace has none.
# Seen: found True, origin None, flash_attn_func False. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check --no-deps flash-attn-4==4.0.0b36
cat > "$work/check.py" <<'PY'
from importlib.util import find_spec

spec = find_spec("flash_attn")
import flash_attn

print(f"found {spec is not None}, origin {spec.origin}, flash_attn_func {hasattr(flash_attn, 'flash_attn_func')}")
PY
found=$("$work/env/bin/python" "$work/check.py")
echo "$found"
[ "$found" = "found True, origin None, flash_attn_func False" ]
