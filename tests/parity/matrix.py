"""Every parallel layout that is legal on at most 8 ranks, and a few of them that hold every pair of settings.

    python -m tests.parity.matrix 0:40

runs rows 0 to 39 and prints a table with the worst deviation of each from one process; without an argument all rows
run. A row trains for 10 steps in fp32 with clipping active, and Adam's eps large enough (1e-6) that a gradient of
almost nothing does not decide a step.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from tests.end_to_end.runs import make_documents, run_all, series
from tests.multi_rank import RankFailedError

MOST_RANKS = 8
LOSS_TOLERANCE, FIRST_NORM_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-5, 1e-4
"""Relative to one process: sums in another order differ by about 1e-7 a step, which ten steps of Adam enlarge."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 16,
    "num_kv_heads": 8,
    "seq_length": 32,
    "train_batch_size": 8,
    "train_iters": 10,
    "eval_interval": 5,
    "eval_iters": 1,
}

MODELS: dict[str, dict[str, Any]] = {
    # grouped queries, rotary, rmsnorm, swiglu, untied output layer
    "llama": {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
    # tied output layer, learned positions, biases
    "gpt": {
        "no_weight_tying": False,
        "pos_emb": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "num_kv_heads": None,
    },
    # parallel residual with one norm, part of the features turned, biases
    "neox": {
        "rotary_pct": 0.5,
        "norm": "layernorm",
        "activation": "gelu",
        "gpt_j_residual": True,
        "gpt_j_tied": True,
        "num_kv_heads": None,
    },
    # documents kept apart, of which labels leave out all, half or none
    "labels": {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "eod_mask_loss": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
}
LABELLED = "labels"


@dataclass(frozen=True)
class Row:
    """One layout.

    tp, pp, dp, cp [ranks], where pp 0 is no pipeline engine; zero: stage; acc [micro batches]; sp: on or off; ring:
    context-parallel ranks form a ring instead of exchanging heads.
    """

    tp: int
    pp: int
    dp: int
    zero: int
    acc: int
    sp: bool
    cp: int
    ring: bool

    @property
    def ranks(self) -> int:
        return self.tp * max(1, self.pp) * self.dp * self.cp

    @property
    def legal(self) -> bool:
        """Whether the configuration's rules accept it."""
        if self.pp >= 1 and self.zero >= 2:
            return False
        return not (self.sp and self.tp == 1) and not (self.ring and self.cp == 1)

    @property
    def layers(self) -> int:
        """Blocks of the model: two, or one for each stage; more would only take longer."""
        return max(2, self.pp)

    def settings(self) -> dict[str, Any]:
        """The keys of the configuration."""
        return {
            "num_layers": self.layers,
            "model_parallel_size": self.tp,
            "pipe_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "context_parallel_method": "ring" if self.ring else "ulysses",
            "sequence_parallel": self.sp,
            "zero_optimization": {"stage": self.zero},
            "gradient_accumulation_steps": self.acc,
        }

    def __str__(self) -> str:
        return " ".join(f"{name}={int(value)}" for name, value in asdict(self).items())


SIZES = {
    "tp": (1, 2, 4),
    "pp": (0, 1, 2, 4),
    "dp": (1, 2),
    "zero": (0, 1, 2, 3),
    "acc": (1, 4),
    "sp": (False, True),
    "cp": (1, 2),
    "ring": (False, True),
}


@cache
def rows() -> tuple[Row, ...]:
    """All legal rows, small worlds first."""
    assert list(SIZES) == [field.name for field in fields(Row)]
    every = (Row(*values) for values in itertools.product(*SIZES.values()))
    return tuple(sorted((row for row in every if row.legal and row.ranks <= MOST_RANKS), key=lambda row: row.ranks))


def model_of(row: Row) -> str:
    """Rows take the models in turn, one further every round, so that none always meets the same settings."""
    number = rows().index(row)
    return list(MODELS)[(number + number // len(MODELS)) % len(MODELS)]


@cache
def covering() -> tuple[tuple[Row, str], ...]:
    """Rows that hold every pair of settings that is legal at all, few and small ones, and models in turn."""
    pairs = {row: set(itertools.combinations(asdict(row).items(), 2)) for row in rows()}
    missing = set().union(*pairs.values())
    chosen: list[Row] = []
    while missing:
        best = max(rows(), key=lambda row: len(pairs[row] & missing) / (2 + row.ranks))
        chosen.append(best)
        missing -= pairs[best]
    return tuple((row, list(MODELS)[number % len(MODELS)]) for number, row in enumerate(chosen))


@dataclass(frozen=True)
class Tolerance:
    """The largest differences to one process, relative."""

    loss: float
    first_norm: float
    norm: float

    @property
    def good(self) -> bool:
        return self.loss <= LOSS_TOLERANCE and self.first_norm <= FIRST_NORM_TOLERANCE and self.norm <= NORM_TOLERANCE

    def __str__(self) -> str:
        return f"{self.loss:.1e}  {self.first_norm:.1e}  {self.norm:.1e}"


class Comparison:
    """Runs layouts on one data set and compares them with one process, which runs once for each model and depth."""

    def __init__(self, folder: Path, steps: int = TINY["train_iters"], evaluations: int = 2) -> None:
        """Writes the data. evaluations: in those steps, the last one behind them."""
        self._folder, self._steps, self._evaluations = folder, steps, evaluations
        tokens, labels = make_documents(folder)
        self._data = {"data_path": str(folder / "text")}
        self._labelled = {
            **{f"{split}_data_paths": [tokens] for split in ("train", "valid")},
            **{f"{split}_label_data_paths": [labels] for split in ("train", "valid")},
        }
        self._found: dict[object, list[dict[str, float]]] = {}

    def train_together(self, chosen: Iterable[tuple[Row, str]]) -> None:
        """Trains rows with their models and what they are compared with; those of one number of ranks in one world."""
        pairs = tuple(chosen)
        runs = {(1, model, row.layers): (model, {"num_layers": row.layers}) for row, model in pairs}
        runs |= {(row.ranks, model, row): (model, row.settings()) for row, model in pairs}
        for ranks in sorted({key[0] for key in runs}):
            self._train(ranks, {key: run for key, run in runs.items() if key[0] == ranks})

    def single(self, model: str, layers: int) -> list[dict[str, float]]:
        """The records of one process."""
        key = (1, model, layers)
        if key not in self._found:
            self._train(1, {key: (model, {"num_layers": layers})})
        return self._found[key]

    def of(self, row: Row, model: str, **more: Any) -> Tolerance:
        """What a layout differs by. RankFailedError if it cannot run."""
        expected, key = self.single(model, row.layers), (row.ranks, model, row)
        if key not in self._found or more:
            self._train(row.ranks, {key: (model, {**row.settings(), **more})})
        got = self._found.pop(key)
        losses = [
            relative(series(got, name), series(expected, name)) for name in ("train/lm_loss", "validation/lm_loss")
        ]
        norms, expected_norms = series(got, "train/grad_norm"), series(expected, "train/grad_norm")
        assert len(norms) == self._steps
        return Tolerance(max(losses), relative(norms[:1], expected_norms[:1]), relative(norms, expected_norms))

    def _train(self, ranks: int, runs: Mapping[Any, tuple[str, dict[str, Any]]]) -> None:
        """Trains models, one after the other in one world."""
        length = {"train_iters": self._steps, "eval_interval": self._steps // self._evaluations}
        cases = {
            key: TINY | length | (self._labelled if model == LABELLED else self._data) | MODELS[model] | settings
            for key, (model, settings) in runs.items()
        }
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            self._found |= run_all(ranks, Path(folder), cases)


def relative(values: list[float], expected: list[float]) -> float:
    """The largest relative difference of two series of the same length; infinite where one is not a number."""
    assert len(values) == len(expected)
    worst = max(abs(value - expected) / abs(expected) for value, expected in zip(values, expected, strict=True))
    return float("inf") if math.isnan(worst) else worst


def chosen_rows(text: str, count: int) -> range:
    """`first:stop`, either of which may be left out, or one number, of count rows."""
    numbers = range(count)
    if ":" not in text:
        return numbers[int(text) : int(text) + 1] if text else numbers
    first, stop = text.split(":")
    return numbers[slice(int(first) if first else None, int(stop) if stop else None)]


def main(expected: str) -> int:
    """Prints the table; 1 if any row deviates or fails."""
    numbers = chosen_rows(expected, len(rows()))
    print(
        f"{len(numbers)} of {len(rows())} rows; tolerances {LOSS_TOLERANCE}, {FIRST_NORM_TOLERANCE}, {NORM_TOLERANCE}"
    )
    print(f"{'row':>4}  {'layout':42}  {'model':5}  {'loss':7}  {'norm 1':7}  {'norm':7}   seconds")
    failed, found, begun = 0, [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        comparison = Comparison(Path(folder))
        for number in numbers:
            row = rows()[number]
            model, started = model_of(row), time.monotonic()
            try:
                difference = comparison.of(row, model)
                reported, good = str(difference), difference.good
                found.append(difference)
            except RankFailedError as error:
                reported, good = str(error).strip()[-2000:], False
            failed += not good
            mark = "" if good else "  FAILED"
            seconds = time.monotonic() - started
            print(f"{number:4}  {row!s:42}  {model:5}  {reported}  {seconds:8.1f}{mark}", flush=True)
    if found:
        worst = Tolerance(*(max(getattr(one, field.name) for one in found) for field in fields(Tolerance)))
        print(f"{'worst':>4} {' ':50} {worst}  {time.monotonic() - begun:8.1f}")
    print(f"{len(numbers) - failed} rows agree with one process, {failed} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
