#!/usr/bin/env bash
# DeepSpeed 0.19.8: `zero_hpz_partition_size` (ZeRO 3, a second copy of the weights within groups of ranks) parts the ranks
# of the world into groups, whatever the `mpu` says. With tensor parallelism in front (ranks 0 and 1 hold two shards of one
# matrix, ranks 0 and 2 the same shard), the group of size 2 is ranks 0 and 1, so each weight is gathered in the backward
# pass from halves of two different shards: no error, and other gradients.
# Seen: a linear layer whose two shards are all ones and all twos; the backward pass of rank 0 multiplies by 1.5 on
# average, where 1 is right. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
pip="$work/env/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.1 setuptools wheel
DS_BUILD_OPS=0 $pip --no-build-isolation deepspeed==0.19.8
cat > "$work/check.py" <<'PY'
import os
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups

deepspeed.init_distributed("gloo")
rank = dist.get_rank()
made = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))}
tensor = next(ranks for ranks in ((0, 1), (2, 3)) if rank in ranks)
data = next(ranks for ranks in ((0, 2), (1, 3)) if rank in ranks)
mpu = SimpleNamespace()
for name, ranks in (("model_parallel", tensor), ("tensor_model_parallel", tensor), ("data_parallel", data)):
    setattr(mpu, f"get_{name}_rank", lambda ranks=ranks: ranks.index(rank))
    setattr(mpu, f"get_{name}_world_size", lambda ranks=ranks: len(ranks))
    setattr(mpu, f"get_{name}_group", lambda ranks=ranks: made[ranks])
shard = torch.nn.Linear(64, 64, bias=False)
torch.nn.init.constant_(shard.weight, 1.0 + tensor.index(rank))
zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
optimizer = torch.optim.SGD(shard.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=shard, optimizer=optimizer, config=settings, mpu=mpu)
x = torch.ones(1, 64, requires_grad=True)
engine.backward(engine(x).sum())
if rank == 0:
    found = dist.get_process_group_ranks(groups._get_zero_param_intra_parallel_group())
    print(f"data-parallel ranks {list(data)}, ranks of the second copy {found}, factor {x.grad.mean() / 64:.2f}")
PY
cd "$work"
found=$(DS_ACCELERATOR=cpu PATH="$work/env/bin:$PATH" OMP_NUM_THREADS=1 "$work/env/bin/torchrun" --nproc-per-node 4 check.py 2>"$work/errors" |
  grep '^data-parallel') || { tail -20 "$work/errors"; exit 1; }
echo "$found"
[ "$found" = "data-parallel ranks [0, 2], ranks of the second copy [0, 1], factor 1.50" ]
