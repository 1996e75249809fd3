"""What cannot be trained beside a frozen model is refused, each error in its own words."""

from typing import Any

import pytest

from tests.config.small import errors

CASES: list[tuple[int, dict[str, Any], str]] = [
    *[
        (1, {"lora": block}, reported)
        for block, reported in [
            ({}, "rank is a whole number from 1 on, not None; write {rank: 8, targets: all}, or the like"),
            ({"rank": 0}, "rank is a whole number from 1 on, not 0"),
            ({"rank": 2.5}, "rank is a whole number from 1 on, not 2.5"),
            ({"rank": 4, "alpha": 0}, "alpha is a number above 0, not 0"),
            ({"rank": 4, "rslora": "yes"}, "rslora is true or false, not 'yes'"),
            ({"rank": 4, "dora": 1}, "dora is true or false, not 1"),
            ({"rank": 4, "base": "nf5"}, "there is no base nf5; did you mean nf4?"),
            ({"rank": 4, "base": 4}, "there is no base 4; base is one of nf4, fp4, int8"),
            ({"rank": 4, "base": "nf4", "dora": True}, "base: nf4 does not go with dora: it reads the rows of frozen"),
            ({"rank": 4, "dropout": 1.0}, "dropout is a probability below 1, not 1.0"),
            ({"rnk": 4}, "it has no rnk; did you mean rank?"),
            ({"rank": 4, "targets": "dens"}, "there is no matrix dens; did you mean dense?"),
            ({"rank": 4, "targets": ["q_proj"]}, "(queries, keys and values are one matrix) and all"),
            ({"rank": 4, "targets": []}, "targets is a list of matrices, or all, not []"),
            (
                {"rank": 4, "modules_to_save": 3},
                "modules_to_save is a list of embedding and head, not 3; write {rank: 8, modules_to_save: [embedding",
            ),
            ({"rank": 4, "modules_to_save": [["head"]]}, "modules_to_save is a list of embedding and head, not [["),
            ({"rank": 4, "modules_to_save": ["embeding"]}, "there is no module embeding; did you mean embedding?"),
            (
                {"rank": 4, "modules_to_save": ["head", "wte"]},
                "there is no module wte; modules_to_save takes embedding (tokens to vectors) and head",
            ),
            (
                {"rank": 4, "modules_to_save": ["head"], "targets": "all"},
                "modules_to_save names head alone, and the output layer is the word embedding's matrix here",
            ),
            ({"rank": 4, "enabled": "no"}, "enabled is true or false, not 'no'"),
        ]
    ],
    (
        1,
        {"lora": {"rank": 4}, "attention_config": [[["rwkv"], "all"]], "pos_emb": "none"},
        "no block has attention, so no block has a query_key_value; write targets: [time_mixing, channel_mixing]",
    ),
    (
        1,
        {"lora": {"rank": 4}, "attention_config": [[["mamba"], "all"]], "pos_emb": "none"},
        "no block has attention, so no block has a query_key_value; write targets: [in_proj, out_proj]",
    ),
    (
        1,
        {"lora": {"rank": 4, "targets": ["dense", "out_proj"]}, "attention_config": [[["gated_delta_net"], "all"]]},
        "no block has the target out_proj, which blocks of kind mamba, mamba2 have; leave that target out",
    ),
    (
        1,
        {"lora": {"rank": 4, "targets": "all"}, "moe_num_experts": 4, "moe_router_type": "topk"},
        "every block has experts in place of its MLP, so no block has a dense_h_to_4h; write targets: "
        "[query_key_value, dense], and experts for updates of these",
    ),
    (1, {"lora": {"rank": 4, "targets": "experts"}}, "no block has experts (moe_num_experts); leave experts out"),
    (
        1,
        {"lora": {"rank": 4, "targets": "shared_experts"}, "moe_num_experts": 4},
        "no block has a shared_h_to_4h (moe_shared_expert_intermediate_size); leave shared_experts out of targets",
    ),
    *[
        (
            1,
            {"lora": {"rank": 4, "targets": ["experts_4h_to_h"], name: value}, "moe_num_experts": 4},
            f"updates of experts take no {name}: peft has none for them",
        )
        for name, value in (("dropout", 0.1), ("dora", True))
    ],
    (
        2,
        {"lora": {"rank": 4, "base": "int8"}, "hidden_size": 64, "model_parallel_size": 2},
        "base: int8 needs rows that divide by 64, and the width of the heads of a rank is 32",
    ),
    (
        1,
        {"lora": {"rank": 4, "base": "nf4"}, "hidden_size": 64, "compile": True},
        "base: nf4 does not go with compile: these matrices are expanded by code that is not compiled",
    ),
    (1, {"lora": {"rank": 4}, "soft_prompt_tuning": {}}, "a soft prompt is trained alone; keep one of the two"),
    *[
        (1, {"soft_prompt_tuning": block}, reported)
        for block, reported in [
            ({"num_tokens": 0}, "num_tokens is a whole number from 1 on, not 0"),
            ({"n_tokens": 4}, "it has no n_tokens; did you mean num_tokens?"),
            ({"init_string": 4}, "init_string is text, not 4"),
            ({"init_range": -1}, "init_range is a number above 0, not -1"),
            ({"num_tokens": 32}, "its 32 vectors leave no room for a text in seq_length = 32"),
        ]
    ],
    (
        1,
        {"soft_prompt_tuning": {"num_tokens": 4}, "reset_attention_mask": True},
        "reset_attention_mask = True: only the first document of a sample would see the soft prompt",
    ),
    (
        1,
        {
            "soft_prompt_tuning": {"num_tokens": 8},
            "curriculum_learning": {
                "enabled": True,
                "min_difficulty": 8,
                "max_difficulty": 32,
                "schedule_type": "fixed_linear",
                "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
            },
        },
        "the shortest sequences are not longer than a prompt of 8 vectors",
    ),
]


@pytest.mark.parametrize(("world_size", "changes", "reported"), CASES, ids=[case[2][:50] for case in CASES])
def test_rule(world_size: int, changes: dict[str, Any], reported: str) -> None:
    lines = errors(world_size, **changes)
    assert any(reported in line for line in lines), "\n".join(lines)
    assert all(line.startswith(("command line: ", *changes)) for line in lines)
