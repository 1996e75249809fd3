"""Files and flags become one mapping, and every value knows where it stands."""

import json
from pathlib import Path

import pytest

from megatron.config.yaml_loader import COMMAND_LINE, merge, read_value
from tests.config.small import write


def test_files_merge_and_keep_their_lines(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yml", "# a comment\nnum-layers: 2\n\nhidden_size: 64\n")
    second = write(tmp_path, "b.json", '{\n\t"train-iters": 1e3, # steps\n\t"optimizer": {"type": "Adam",},\n}\n')
    merged = merge([first, second], {"seq-length": 8})
    assert merged.issues == []
    assert {name: (given.value, given.location) for name, given in merged.values.items()} == {
        "num_layers": (2, f"{first}:2"),
        "hidden_size": (64, f"{first}:4"),
        "train_iters": (1000.0, f"{second}:2"),
        "optimizer": ({"type": "Adam"}, f"{second}:3"),
        "seq_length": (8, COMMAND_LINE),
    }
    assert merged.texts == {"a.yml": first.read_text(), "b.json": second.read_text()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("2.0e-5", 2e-5),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
        ("0x10", 16),
        ("0o17", 15),
        ("0o18", "0o18"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("1_000", 1000),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("True", True),
        ("null", None),
        ("[1, 2e1]", [1, 20.0]),
        ("a: b: c", "a: b: c"),
    ],
)
def test_values_read_as_yaml_with_modern_floats(text: str, value: object) -> None:
    read = read_value(text)
    assert read == value
    assert type(read) is type(value)


def test_a_duplicate_names_both_positions_whatever_its_spelling(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yml", "num-layers: 2\n")
    second = write(tmp_path, "b.yml", "seq_length: 8\nnum_layers: 3\n")
    assert [str(issue) for issue in merge([first, second]).issues] == [
        f"{second}:2: num_layers = 3: the key is also given at {first}:1, as 2; keep one of the two"
    ]


def test_a_duplicate_inside_one_file_is_found_at_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yml", "a: 1\nb: {c: [{d: 1,\n d: 2}]}\na: 3\n")
    reported = [str(issue) for issue in merge([path]).issues]
    assert reported == [
        f"{path}:3: d: the key is also given at {path}:2; keep one of the two",
        f"{path}:4: a = 3: the key is also given at {path}:1, as 1; keep one of the two",
    ]


def test_flags_win_over_files(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yml", "num_layers: 2\n")
    merged = merge([path], {"num-layers": 5})
    assert merged.values["num_layers"].value == 5
    assert merged.issues == []


def test_a_suffix_may_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "6-7B.yml", "num_layers: 2\n")
    assert merge([tmp_path / "6-7B"]).values["num_layers"].location == f"{path}:1"


def test_an_empty_file_is_no_issue(tmp_path: Path) -> None:
    merged = merge([write(tmp_path, "a.yml", "# nothing\n"), write(tmp_path, "b.yml", "")])
    assert (merged.values, merged.issues) == ({}, [])


def test_two_files_of_one_name_keep_both_texts(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one = write(tmp_path, "a.yml", "num_layers: 2\n")
    two = write(tmp_path / "x", "a.yml", "seq_length: 2\n")
    assert set(merge([one, two]).texts) == {"a.yml", "a-2.yml"}


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("num_layers: [1, 2\n", "this is not YAML"),
        ("- 1\n- 2\n", "the file is not a mapping"),
        ("just text\n", "the file is not a mapping"),
        ("1: 2\n", "the key 1 is not text"),
        ("a: !!python/object:os.system {}\n", "this is not YAML"),
        ("a: 2020-99-99\n", "cannot be read"),
        ("a: 1\n---\nb: 2\n", "this is not YAML"),
        ("a: 1\n\tb: 2\n", ":2: there is a tab at the start of the line"),
        ("a: 1\nb:2\nc: 3\n", ":2: there is no space after the colon; write `key: value`"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_issue(tmp_path: Path, text: str, reported: str) -> None:
    path = write(tmp_path, "a.yml", text)
    issues = merge([path]).issues
    assert len(issues) == 1
    assert reported in str(issues[0])
    assert str(path) in str(issues[0])


def test_a_json_file_is_called_json(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"a": 1,\n "b": 2 "c": 3}')
    assert str(merge([path]).issues[0]).startswith(f"{path}:2: this is not JSON")


def test_a_file_named_twice_is_one_issue(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yml", "a: 1\nb: 2\n")
    reported = [str(issue) for issue in merge([path, tmp_path / "a"]).issues]
    assert reported == [f"{path}: the file is named twice; name it once"]


def test_binary_files_and_folders_are_issues(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_bytes(b"\xff\xfe\x00\x81")
    reported = [str(issue) for issue in merge([tmp_path / "a.yml", tmp_path]).issues]
    assert "cannot be read" in reported[0]
    assert "folder" in reported[1]


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "small.yml", "num_layers: 2\n")
    reported = str(merge([tmp_path / "smal.yml"]).issues[0])
    assert "there is no such configuration file" in reported
    assert f"did you mean {tmp_path / 'small.yml'}?" in reported


def test_comments_and_tabs_of_json_are_blanks_outside_of_strings(tmp_path: Path) -> None:
    text = '{\n\t// one\n\t"save": "a\tb//c#d/*e*/\\"", /* x: 1,\n "y": 2 */ "seed": 7, # z\n\t'
    text += "\"lr-decay-style\": 'a // b',}\n"
    path = write(tmp_path, "a.json", text)
    merged = merge([path])
    assert merged.issues == []
    assert {name: (given.value, given.location) for name, given in merged.values.items()} == {
        "save": ('a\tb//c#d/*e*/"', f"{path}:3"),
        "seed": (7, f"{path}:4"),
        "lr_decay_style": ("a // b", f"{path}:5"),
    }


@pytest.mark.parametrize("escaped", [True, False])
def test_strings_of_json_are_what_json_says(escaped: bool, tmp_path: Path) -> None:
    """Characters in two escapes, and those that YAML takes for ends of lines or not for text."""
    values = {
        "stop": [
            "🙂",
            "x\U0010fffdy",
            "a\u2028b\u2029c\x85d",
            "\x7f\x00\x1f\ufeff\ufffe",
            "\\ud83d\\ude42",
            "\\\\",
            'é/"//#',
        ],
        "a🙂": {"𝄞": "\r\n\t "},
    }
    text = json.dumps(values, ensure_ascii=escaped).replace("\\\\", "\\u005c").replace("/", "\\/")
    assert json.loads(text) == values
    for written in (text, json.dumps(values, ensure_ascii=escaped, indent="\t")):
        merged = merge([write(tmp_path, "a.json", written)])
        assert merged.issues == []
        assert {name: given.value for name, given in merged.values.items()} == json.loads(written)
    assert read_value(r'["\ud83d\ude42", "\ud83d\\ude42"]') == r'["\ud83d\ude42", "\ud83d\\ude42"]', "half of one"
    assert read_value(r'{"stop": ["\ud83d\ude42", "\\ud83d"]}') == {"stop": ["🙂", r"\ud83d"]}


@pytest.mark.parametrize("half", [r"\ud83d", r"\ude42", r"\ud83d\ud83d", r"\ude42\ud83d"])
def test_half_of_a_character_is_an_issue(half: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"seed": 1, // one\n "stop": ["x' + half + '"]}')
    assert [str(issue) for issue in merge([path]).issues] == [
        f"{path}:2: this is not text: an escape is half of a character, without the other half; "
        "write the character itself"
    ]


def test_a_merge_key_brings_what_the_file_does_not_say(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yml", "<<: [{seed: 3, hidden-size: 4}, {seed: 5, num_layers: 1}]\nhidden_size: 64\n")
    merged = merge([path])
    assert merged.issues == []
    assert {name: given.value for name, given in merged.values.items()} == {
        "hidden_size": 64,
        "seed": 3,
        "num_layers": 1,
    }
    again = merge([write(tmp_path, "b.yml", "<<: {seed: 3}\nhidden_size: 5\nhidden-size: 6\n")])
    assert [issue.key for issue in again.issues] == ["hidden_size"]
