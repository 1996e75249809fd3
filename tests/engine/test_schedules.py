"""Every pipeline schedule trains like 1F1B, with everything that a model may have, and continues any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import make_dataset, make_documents, run_all, series
from tests.parity.matrix import MODELS, TINY, relative

SMALL: dict[str, Any] = {
    **TINY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 4,
    "train_iters": 2,
    "eval_interval": 2,
    "gradient_accumulation_steps": 4,
    "pipe_parallel_size": 2,
    "peak_theoretical_tflops": 1.0,
}
GPT = {**MODELS["gpt"], "precision": "fp32"}
RECOMPUTED = {"checkpoint_activations": True, "partition_activations": True}
CASES: dict[str, dict[str, Any]] = {
    "tied, ZeRO 1": {**GPT, "zero_optimization": {"stage": 1}},
    "bfloat16": {"precision": "bfloat16"},
    "documents, logits": {**MODELS["labels"], "fused_linear_cross_entropy": False},
    "experts": {"moe_num_experts": 4, "moe_top_k": 2, "moe_aux_loss_coeff": 0.1},
    "LoRA, uneven": {"lora": {"rank": 2}, "num_layers": 5},
    "recomputed": RECOMPUTED,
    "recomputed core, shared positions": {"recompute_granularity": "selective", "pos_emb": "rpe"},
}
"""Changes of a model."""
TURNS = ("zero_bubble", "dualpipev")
RUNS = {
    name: ("1f1b", TURNS[number % 2], *(("interleaved",) if number < 3 else ())) for number, name in enumerate(CASES)
}
"""The schedules under which each is trained."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[dict[str, float]]]:
    """(case, schedule) -> the records of a run."""
    folder = tmp_path_factory.mktemp("schedules")
    tokens, labels = make_documents(folder)
    data: dict[str, Any] = {"data_path": str(folder / "text")}
    labelled = {
        **{f"{split}_data_paths": [tokens] for split in ("train", "valid")},
        **{f"{split}_label_data_paths": [labels] for split in ("train", "valid")},
    }
    return run_all(
        2,
        folder,
        {
            (name, schedule): {
                **SMALL,
                **(labelled if name.startswith("documents") else data),
                **case,
                "pipe_schedule": schedule,
            }
            for name, case in CASES.items()
            for schedule in RUNS[name]
        },
    )


@pytest.mark.parametrize("name", CASES)
def test_schedules_train_like_one_stage_a_rank(name: str, runs: dict[Any, list[dict[str, float]]]) -> None:
    expected = runs[name, "1f1b"]
    others = {schedule: records for (case, schedule), records in runs.items() if case == name and schedule != "1f1b"}
    assert others
    tolerance = 1e-4 if name == "bfloat16" else 1e-6
    for schedule, records in others.items():
        for metric in ("train/lm_loss", "validation/lm_loss", "train/grad_norm"):
            assert relative(series(records, metric), series(expected, metric)) < tolerance, (schedule, metric)
        if schedule == "interleaved":  # the same sums in the same order
            assert series(records, "train/lm_loss") == series(expected, "train/lm_loss")


def test_a_checkpoint_continues_under_any_schedule(tmp_path: Path) -> None:
    """One process and each schedule in turn train two steps more; the files are those of a pipeline."""
    base = {
        **SMALL,
        **GPT,
        "data_path": make_dataset(tmp_path),
        "lr_decay_iters": 12,
        "zero_optimization": {"stage": 1},
    }
    order = ("1f1b", "zero_bubble", "interleaved", "dualpipev", "1f1b")
    one = run_all(2, tmp_path / "one", {"all": {**base, "train_iters": 10, "eval_interval": 10}})["all"]
    folder = tmp_path / "save"
    cases = {
        number: {
            **base,
            "pipe_schedule": schedule,
            "train_iters": 2 * number + 2,
            "save": str(folder),
            "checkpoint_factor": 2,
            "checkpoint_validation_with_forward_pass": True,
            **({"load": str(folder)} if number else {}),
        }
        for number, schedule in enumerate(order)
    }
    parts = run_all(2, tmp_path / "parts", cases)
    losses = [loss for records in parts.values() for loss in series(records, "train/lm_loss")]
    assert relative(losses, series(one, "train/lm_loss")) < 1e-6
    saved = [sorted(path.name for path in folder.glob(f"global_step{2 * step}/layer_*")) for step in range(1, 6)]
    assert all(names == saved[0] for names in saved)
    assert saved[0]
