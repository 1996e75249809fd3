#!/usr/bin/env bash
# safetensors 0.8.0, safetensors.numpy.save: a transposed (not contiguous) array is written in memory order under its
# logical shape, so what is read back has the right shape and other values; nothing is raised. 0.7.0 writes it right.
# Whoever exports weights from numpy has to call numpy.ascontiguousarray first.
# Seen: 0.7.0 "equal: True"; 0.8.0 "equal: False". This script fails when either changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/check.py" <<'PY'
import numpy
import safetensors.numpy

weights = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
stored = safetensors.numpy.load(safetensors.numpy.save({"w": weights.T}))["w"]
print("shape", stored.shape, "equal:", numpy.array_equal(stored, weights.T))
PY

run() {
  python3 -m venv "$work/$1"
  "$work/$1/bin/pip" install --quiet --disable-pip-version-check "safetensors==$1" numpy==2.3.4
  "$work/$1/bin/python" "$work/check.py"
}

old=$(run 0.7.0)
new=$(run 0.8.0)
echo "safetensors 0.7.0: $old"
echo "safetensors 0.8.0: $new"
[ "$old" = "shape (3, 2) equal: True" ] && [ "$new" = "shape (3, 2) equal: False" ]
