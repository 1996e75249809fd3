"""The quickstart's stages: every command that it calls exists and fits the others, without running any of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tools.prepare_data
import tools.preprocess_data
import tools.quickstart as quickstart
import tools.train_tokenizer
from megatron.config import FIELDS, Config
from megatron.errors import ConfigError
from megatron.launcher.arguments import read_request
from megatron.launcher.resolve import resolve_request
from tools.stages import Stage

PARSERS = {
    "prepare_data.py": tools.prepare_data.parser,
    "tools/preprocess_data.py": tools.preprocess_data.parser,
    "tools/train_tokenizer.py": tools.train_tokenizer.parser,
}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.ROOT)


def stages() -> list[Stage]:
    return quickstart.make_stages(2)


def launched() -> dict[str, tuple[Config, list[str]]]:
    """The configuration of each stage that goes through the launcher, and what it asks for that is not built."""
    found = {}
    for stage in stages():
        if stage.command[1] == "deepy.py":
            resolution = resolve_request(read_request(stage.command[2:]), {}).resolution
            found[stage.name] = (resolution.config, [*resolution.not_supported_yet, *resolution.warnings])
    return found


def test_the_commands_of_tools_are_understood() -> None:
    seen = set()
    for stage in stages():
        script, *arguments = stage.command[1:]
        if script in PARSERS:
            PARSERS[script]().parse_args(arguments)
            seen.add(script)
    assert seen == PARSERS.keys()


def test_the_commands_of_the_launcher_resolve_without_a_complaint() -> None:
    assert {name: complaints for name, (_, complaints) in launched().items()} == {
        "train": [],
        "bits": [],
        "cloze": [],
        "samples": [],
    }


def test_the_configuration_names_the_files_that_the_stages_make() -> None:
    made = {str(path) for stage in stages() for path in stage.results}
    config, _ = launched()["train"]
    assert config.tokenizer.vocab_file in made
    paths = [*config.data.train_data_paths, *config.data.valid_data_paths, *config.data.test_data_paths]
    assert {f"{path}{suffix}" for path in paths for suffix in (".bin", ".idx")} <= made
    assert f"{config.checkpoint.save}/latest" in made
    assert f"{config.observe.log_dir}/metrics.jsonl" in made


def test_every_measure_reads_the_checkpoint_that_training_wrote() -> None:
    found = {name: config.checkpoint for name, (config, _) in launched().items()}
    saved = found["train"].save
    assert {checkpoint.load for checkpoint in found.values()} == {saved}
    assert found["train"].load_fallback == "fresh"
    assert {found[name].load_fallback for name in ("bits", "cloze", "samples")} == {FIELDS["load_fallback"].default}


def test_the_batch_is_shared_by_every_number_of_workers_that_may_be_chosen() -> None:
    config, _ = launched()["train"]
    for asked in range(1, 20):
        assert config.training.train_batch_size % quickstart.training_workers(asked) == 0
    assert [quickstart.training_workers(asked) for asked in (1, 2, 3, 7, 8, 9)] == [1, 2, 2, 4, 8, 8]
    with pytest.raises(ConfigError, match="--workers"):
        quickstart.training_workers(0)


def test_the_summary_shows_measures_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "WORK_DIR", tmp_path)
    (tmp_path / "logs" / "bits_per_byte").mkdir(parents=True)
    (tmp_path / "evaluation").mkdir()
    bits = {"bits_per_byte": 1.5, "gzip -9": 2.0514, "xz -9e": 1.7777}
    (tmp_path / "logs" / "bits_per_byte" / "bits_per_byte.json").write_text(json.dumps(bits))
    scores = {"results": {"python_stdlib_cloze": {"acc,none": 0.615}}}
    (tmp_path / "evaluation" / "python_stdlib_eval_results_1.json").write_text(json.dumps(scores))
    samples = [{"context": "def f(x):", "text": "\n    return x"}, {"context": "a", "text": None}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    reported = quickstart.summary({"text": 2.0, "train": 300.4})
    for part in ("1.500", "2.051", "1.778", "61.5%", "  | def f(x):\n  |     return x\n", "302 s in all", "train 300"):
        assert part in reported
