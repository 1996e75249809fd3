"""A checkpoint remembers tokenizer and data order; a resume that reads others is refused by the key that differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.load.run_inputs_check import RunInputs, same_data_order, same_tokenizer
from megatron.errors import ConfigError
from megatron.tokenizer_info import TokenizerInfo, describe_tokenizer
from megatron.tokenizers.char_level import CharLevelTokenizer

WHERE = Path("run/global_step5")
ORDER: dict[str, Any] = {
    "seed": 1234,
    "seq_length": 32,
    "pack_impl": "packed",
    "data_path": [[10, 500, "aa"], [20, 900, "bb"]],
    "train_epochs": None,
    "passes": [1, 1],
    "train_data_weights": [0.5, 0.5],
}


class Words:
    """A tokenizer of another vocabulary with as many tokens."""

    vocab_size = CharLevelTokenizer().vocab_size
    eod = CharLevelTokenizer().eod

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


STORED = RunInputs(describe_tokenizer("CharLevelTokenizer", CharLevelTokenizer())).as_json()["tokenizer"]


def facts(**changes: Any) -> TokenizerInfo:
    return replace(describe_tokenizer("CharLevelTokenizer", CharLevelTokenizer()), **changes)


def check(own: TokenizerInfo, *, new_tokens: bool = False, trains: bool = True) -> None:
    same_tokenizer(STORED, own, WHERE, new_tokens=new_tokens, trains=trains)


def test_another_kind_that_gives_the_same_ids_is_the_same_tokenizer() -> None:
    check(facts(kind="HFTokenizer"))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("own", [facts(vocab_size=400), describe_tokenizer("Words", Words())], ids=["size", "ids"])
def test_another_tokenizer_is_refused(own: TokenizerInfo, trains: bool) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_type.*trained with CharLevelTokenizer of 512 tokens"):
        check(own, trains=trains)


def test_another_end_of_document_matters_to_training_alone() -> None:
    with pytest.raises(ConfigError, match=r"end of document 0.*this is .*end of document 7"):
        check(facts(eod=7))
    check(facts(eod=7), trains=False)


def test_tuning_to_another_tokenizer_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    check(facts(vocab_size=600), new_tokens=True)
    assert "trained with another tokenizer" in caplog.text
    assert "88 rows of the embedding belong to new tokens" in caplog.text


def test_a_checkpoint_without_facts_is_taken_as_it_is() -> None:
    same_tokenizer(None, facts(vocab_size=1), WHERE, new_tokens=False, trains=True)
    same_data_order(None, ORDER, WHERE, override=False)


@pytest.mark.parametrize(
    ("key", "value", "reported"),
    [
        ("seed", 7, "trained with 1234"),
        ("seq_length", 16, "trained with 32"),
        ("pack_impl", "unpacked", "trained with 'packed'"),
        ("data_path", [[10, 500, "aa"]], "20 documents with 900 tokens"),
        ("data_path", [[10, 500, "aa"], [20, 900, "cc"]], r"\[bb\].*\[cc\]"),
        ("data_path", [[20, 900, "bb"], [10, 500, "aa"]], r"\[aa\].*\[bb\].*these are.*\[bb\].*\[aa\]"),
        ("train_epochs", 2, "trained with None"),
        ("passes", [1, 2], r"shuffled 1 pass\(es\).*this one shuffles 1 to 2 passes"),
        ("train_data_weights", [0.9, 0.1], r"trained with \[0.5, 0.5\]"),
    ],
)
def test_another_order_of_samples_needs_a_request(
    key: str, value: Any, reported: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = {**ORDER, key: value}
    with pytest.raises(ConfigError, match=rf"(?s){reported}.*override_data_order") as caught:
        same_data_order(ORDER, own, WHERE, override=False)
    assert [issue.key for issue in caught.value.issues] == ["train_iters" if key == "passes" else key]
    same_data_order(ORDER, own, WHERE, override=True)
    assert caplog.text.count("the samples that follow are in a new order") == 1
    same_data_order(ORDER, ORDER, WHERE, override=False)


ONE = {"seed": 1, "seq_length": 32, "pack_impl": "packed", "data_path": [[10, 500, "aa"]], "passes": [2]}
FULL = {**ONE, "pack_impl": "unpacked", "allow_chopped": True, "passes": None}


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ({**ONE, "train_epochs": 2}, {**ONE, "train_epochs": None}),  # the same two passes, given as steps
        ({**FULL, "train_epochs": 1}, {**FULL, "train_epochs": 3}),  # each pass is shuffled by itself
        (FULL, {**FULL, "train_label_data_paths": [10]}),  # written before labels were kept
    ],
)
def test_a_length_that_changes_no_order_is_no_difference(stored: dict[str, Any], own: dict[str, Any]) -> None:
    same_data_order(stored, own, WHERE, override=False)


def test_labels_that_leave_other_documents_are_reported() -> None:
    stored, own = ({**FULL, "train_label_data_paths": [count]} for count in (10, 9))
    with pytest.raises(ConfigError, match=r"read \[10\] documents.*this one reads \[9\], by their labels"):
        same_data_order(stored, own, WHERE, override=False)
    same_data_order(stored, {**own, "seed": 1, "allow_chopped": False}, WHERE, override=True)
