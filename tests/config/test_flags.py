"""Every key is a flag."""

import pytest

from megatron.config.flags import read_flags


def test_both_spellings_and_both_forms() -> None:
    flags = read_flags(["train.py", "--train-iters", "100", "--train_batch_size=8", "--lr=-1e-3", "a.yml", "-i", "x"])
    assert flags.values == {"train_iters": 100, "train_batch_size": 8, "lr": -1e-3}
    assert flags.rest == ["train.py", "a.yml", "-i", "x"]


def test_negative_numbers_are_values() -> None:
    assert read_flags(["--num_nodes", "-1"]).values == {"num_nodes": -1}


def test_switches_stand_alone_or_take_a_value() -> None:
    assert read_flags(["--finetune", "a.yml"]).values == {"finetune": True}
    assert read_flags(["--finetune", "a.yml"]).rest == ["a.yml"]
    assert read_flags(["--finetune", "false", "--gpt-j-residual=true"]).values == {
        "finetune": False,
        "gpt_j_residual": True,
    }
    assert read_flags(["--use_wandb", "null"]).values == {"use_wandb": None}


def test_lists_take_every_value() -> None:
    assert read_flags(["--eval_tasks", "piqa", "lambada*", "--seed", "3"]).values == {
        "eval_tasks": ["piqa", "lambada*"],
        "seed": 3,
    }
    assert read_flags(["--extra_save_iters", "1", "2"]).values == {"extra_save_iters": [1, 2]}
    assert read_flags(["--extra_save_iters", "[1, 2]"]).values == {"extra_save_iters": [1, 2]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stop", "###"], ["###"]),
        (["--stop", "### Instruction:", "\n\n"], ["### Instruction:", "\n\n"]),
        (["--stop", "\nUser", " END", "Answer #", "User:"], ["\nUser", " END", "Answer #", "User:"]),
        (["--stop=User:"], ["User:"]),
        (["--stop", "[/INST]"], ["[/INST]"]),
        (["--stop", '["###", "[/INST]"]'], ["###", "[/INST]"]),
        (["--stop", "1e5", "yes", "null"], ["1e5", "yes", "null"]),
        (["--stop", "null"], None),
        (["--task_labels", "no", "yes"], ["no", "yes"]),
        (["--task_labels", "0"], ["0"]),
        (["--comet_tags", "2024-06-01"], ["2024-06-01"]),
        (["--train_data_paths", "007", "data/a: b"], ["007", "data/a: b"]),
        (["--train_data_paths", "[a, b]"], ["a", "b"]),
        (["--online_dataserver_ips", "10.0"], "10.0"),
        (["--online_dataserver_ips", "10.0.0.1", "localhost"], ["10.0.0.1", "localhost"]),
    ],
)
def test_texts_of_a_list_are_taken_as_they_are(arguments: list[str], expected: object) -> None:
    key = arguments[0].strip("-").partition("=")[0]
    assert read_flags([*arguments, "--seed", "3"]).values == {key: expected, "seed": 3}


def test_text_is_taken_as_it_is() -> None:
    values = read_flags(["--wandb_group", "007", "--comment=yes", "--prompt_end", "1e5", "--save", "null"]).values
    assert values == {"wandb_group": "007", "comment": "yes", "prompt_end": "1e5", "save": None}


def test_mappings_are_yaml() -> None:
    values = read_flags(["--optimizer", "{type: Adam, params: {lr: 1e-4}}"]).values
    assert values == {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}


def test_flags_of_the_caller_and_what_follows_a_double_dash_are_left() -> None:
    flags = read_flags(["--dry-run", "--json", "--seed", "1", "--", "--seed"], ["--dry-run", "--json"])
    assert flags.values == {"seed": 1}
    assert flags.rest == ["--dry-run", "--json", "--seed"]


def test_issues_are_reported_at_once() -> None:
    flags = read_flags(["--train-itres", "5", "--seed", "--seed", "3", "--qqqqqq", "a", "b.py"], ["--dry-run"])
    assert flags.rest == ["b.py"]
    assert [str(issue) for issue in flags.issues] == [
        "command line: --train-itres: there is no such flag; did you mean --train_iters?",
        "command line: --seed: the flag needs a value; give a whole number",
        "command line: --qqqqqq: there is no such flag; configs/README.md lists every key",
    ]
    assert "given twice" in str(read_flags(["--seed", "2", "--seed", "3"]).issues[0])
