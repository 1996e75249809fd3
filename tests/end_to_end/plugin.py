"""Parts that the project does not know: a module that registers them and one that implements them, as a user's package.

`write` puts both in a folder; the tests put that folder on PYTHONPATH and the first module in NEOX_PLUGINS.
"""

from __future__ import annotations

from pathlib import Path

PLUGIN = "unknown_parts"

REGISTERS = """
from megatron.registry import (
    ACTIVATIONS, NORMS, OBJECTIVES, OPTIMIZERS, POSITIONS, SCHEDULES, SINKS, TOKENIZERS,
    ActivationEntry, Entry, NormEntry, OptimizerEntry, PositionEntry, ScheduleEntry, Setting, SinkEntry, TensorSpec,
    TokenizerEntry,
)

CODE = "unknown_parts_code:"
NORMS.register(NormEntry(
    "dyt", CODE + "DynamicTanh", "Dynamic tanh, arXiv:2503.10622",
    tensors=("weight", "bias"), optional=("bias",), scalars=("alpha",), epsilon="rms_norm_epsilon",
))
ACTIVATIONS.register(ActivationEntry("squared_glu", CODE + "squared_glu", "Gated by a squared ReLU", gated=True))
POSITIONS.register(PositionEntry(
    "both", CODE + "Both", "A learned vector a position and a learned bias a distance",
    enters=frozenset({"embedding", "scores"}),
    embedding=(TensorSpec("table", ("max_position_embeddings", "hidden_size")),),
    scores=(TensorSpec("bias", (8, "num_attention_heads"), shard_dim=1),),
))
OPTIMIZERS.register(OptimizerEntry(
    "signum", CODE + "signum", "Sign of the momentum", settings={"momentum": Setting("fraction")}, state_per_param=1,
))
SCHEDULES.register(ScheduleEntry("quadratic", CODE + "quadratic", "Falls as 1 - x^2"))
TOKENIZERS.register(TokenizerEntry("Nibbles", CODE + "Nibbles", "Half bytes", files=(), vocab_size=20))
OBJECTIVES.register(Entry("halved", CODE + "Halved", "Half of the cross entropy"))
SINKS.register(SinkEntry("lines", CODE + "Lines", "Lines of text"))
"""

CODE = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

from megatron.model.positions.base import Positions
from megatron.objectives.language_model import LanguageModel
from megatron.distributed.param_attrs import mark_embedding_like, mark_tied


class DynamicTanh(nn.Module):
    def __init__(self, features, epsilon, bias):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) / 2)
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x):
        y = torch.tanh(self.alpha * x) * self.weight
        return y if self.bias is None else y + self.bias


def squared_glu(x):
    plain, gate = x.chunk(2, dim=-1)
    return plain * torch.relu(gate) ** 2


class Table(nn.Module):
    def __init__(self, rows, width, source, fill):
        super().__init__()
        self.table = source.replicated("table", (rows, width), fill)
        mark_embedding_like(self.table)

    def forward(self, length, offset, positions, device):
        return self.table[offset : offset + length].unsqueeze(1)


class Bias(nn.Module):
    def __init__(self, heads, source):
        super().__init__()
        self.bias = source.sharded("bias", (8, heads), lambda full, generator: full.zero_(), dim=1)
        mark_embedding_like(self.bias)
        mark_tied(self.bias)

    def forward(self, length, device):
        return self.bias.float()[torch.arange(length, device=device).clamp(max=7)].t()


class Both(Positions):
    @classmethod
    def for_embedding(cls, model, source, fill):
        return Table(model.max_position_embeddings, model.hidden_size, source, fill)

    @classmethod
    def for_scores(cls, model, source, multipliers):
        return Bias(model.num_attention_heads, source)


class Signum(torch.optim.Optimizer):
    def __init__(self, groups, lr, momentum):
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.add_(average.sign(), alpha=-group["lr"])


def signum(groups, request):
    return Signum(groups, request.lr, request.number("momentum", 0.9))


def quadratic(moment):
    return 1 - moment.progress**2


class Nibbles:
    vocab_size, eod, begin, lossless, engine = 20, 16, 16, True, "half bytes"
    special_tokens, prefix_ids = {}, ()

    def __init__(self, vocab_file=None, merge_file=None):
        pass

    def encode(self, text):
        return [half for byte in text.encode() for half in divmod(byte, 16)]

    def encode_with_special_tokens(self, text):
        return self.encode(text)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts):
        return [np.array(self.encode(text), np.uint16) for text in texts]

    def decode(self, ids):
        pairs = zip(ids[::2], ids[1::2])
        return bytes(16 * high + low for high, low in pairs).decode(errors="replace")

    def bytes_of(self, token):
        return None


class Halved(LanguageModel):
    def loss(self, *arguments, **named):
        return super().loss(*arguments, **named) / 2


class Lines:
    def __init__(self, path):
        self.path = path

    @classmethod
    def open(cls, observe, start):
        return cls(Path(observe.log_dir) / "lines.txt")

    def write(self, iteration, metrics):
        with self.path.open("a") as file:
            file.write(f"{iteration} {metrics.get('train/learning_rate')}\\n")

    def close(self):
        pass
"""


def write(folder: Path) -> None:
    """The package of a user who adds parts."""
    (folder / f"{PLUGIN}.py").write_text(REGISTERS)
    (folder / "unknown_parts_code.py").write_text(CODE)
