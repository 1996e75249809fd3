#!/usr/bin/env bash
# torch 2.13.0: a TorchDispatchMode sees Tensor.item() as aten._local_scalar_dense, and does not see Tensor.tolist() of a
# CPU tensor at all. Tools that count what the host reads of a training step in this way, to find what would make it wait
# for a GPU, miss every tolist(); a TorchFunctionMode sees it.
# Seen: item [_local_scalar_dense], tolist [], tolist as a function [tolist]. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$work/check.py" <<'PY'
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


tensor = torch.arange(3)
with Operators() as item:
    tensor[0:1].squeeze().item()
with Operators() as listed:
    tensor.tolist()
with Functions() as function:
    tensor.tolist()
read = [name for name in item.names if name == "_local_scalar_dense"]
print(f"item {read}, tolist {listed.names}, tolist as a function {function.names}")
PY
found=$("$work/env/bin/python" -W ignore "$work/check.py")
echo "$found"
[ "$found" = "item ['_local_scalar_dense'], tolist [], tolist as a function ['tolist']" ]
