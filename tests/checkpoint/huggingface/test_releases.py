"""Folders of two releases of transformers are read as they read them, and read ours alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.stored_model import open_model
from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.models import MODELS, OF_LATER_RELEASES, make
from tests.checkpoint.huggingface.random_models import DRAWN, ours
from tests.checkpoint.huggingface.release import EACH, OLDER, run
from tests.checkpoint.huggingface.tokenized import FOLDERS
from tools import convert_from_hf, convert_to_hf

pytestmark = pytest.mark.registry
RELEASES = (OLDER, "installed")


@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_wrote_is_read_as_it_reads_it(release: str, tmp_path: Path) -> None:
    """Every family, with the spellings that the release writes; the same logits to 1e-5, or a refusal."""
    written = {name: logits for name, logits in run(release, "write", tmp_path).items() if name != "release"}
    assert len(written) > EACH * len(DRAWN) // 3
    read = set()
    for name, expected in written.items():
        try:
            found = ours(tmp_path / name)
        except (ConfigError, RunError):
            continue
        read.add(name.split("-")[0])
        apart, largest = (float(each.abs().max()) for each in (found - expected, expected))
        assert apart <= 1e-5 * max(1.0, largest), name
    lacking = {"nemotron_h", "qwen3_5_text", "qwen3_5_moe_text"} if release == OLDER else set()
    assert read == set(DRAWN) - lacking, "every family was compared"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we give away: every kind of tokenizer, and every model of the conversion tests."""
    folder = tmp_path_factory.mktemp("given")
    work = tmp_path_factory.mktemp("work")
    for name, write in FOLDERS.items():
        write(work / name / "theirs")
        theirs, mine = work / name / "theirs", work / name / "ours"
        assert convert_from_hf.main(["--input-dir", str(theirs), "--output-dir", str(mine)]) == 0
        assert convert_to_hf.main(["--input-dir", str(mine), "--output-dir", str(folder / f"tokenizer {name}")]) == 0
    for name in MODELS.keys() - OF_LATER_RELEASES:
        model = make(name)
        with torch.no_grad():
            for called, parameter in model.named_parameters():
                if called.endswith(("act_fn.alpha_p", "act_fn.alpha_n")):  # of xIELU: 4.57.6 reads them as bfloat16
                    parameter.copy_(parameter.bfloat16())
        model.save_pretrained(work / "models" / name)
        adopt(Folder.open(work / "models" / name), work / "adopted" / name)
        export(open_model(work / "adopted" / name), folder / f"model {name}")
    return folder


def test_both_releases_read_what_we_wrote_alike(given: Path) -> None:
    """Logits to 1e-5, ids of texts with and without special tokens, begin and end ids."""
    older, newer = (run(release, "read", given) for release in RELEASES)
    assert older.keys() == newer.keys()
    assert len(older) == 3 * len(FOLDERS) + len(MODELS) - len(OF_LATER_RELEASES) + 1
    for name, answer in newer.items():
        if isinstance(answer, torch.Tensor):
            torch.testing.assert_close(older[name], answer, rtol=1e-5, atol=1e-5, msg=name)
        elif name != "release":
            assert older[name] == answer, name
