"""Every shipped configuration resolves at the world size it is meant for, and fits the device it names."""

import re
from pathlib import Path

import pytest

from megatron.config import Config, Resources, resolve
from megatron.plan import make_plan
from tests.contracts.shipped import CONFIGS, FILES, intended, name_of

GIB = 2**30

PARAMETERS = {
    "20B": 20_554_567_680,
    "pythia/70M": 70_426_624,
    "pythia/160M": 162_322_944,
    "pythia/410M": 405_334_016,
    "pythia/1B": 1_011_781_632,
    "pythia/1-4B": 1_414_647_808,
    "pythia/2-8B": 2_775_208_960,
    "pythia/6-9B": 6_857_302_016,
    "pythia/12B": 11_846_072_320,
    "llama/7B": 6_738_415_616,
    "llama/13B": 13_015_864_320,
    "llama/30B": 32_528_943_616,
    "llama/65B": 65_285_660_672,
    "llama2/7B": 6_738_415_616,
    "llama2/13B": 13_015_864_320,
    "llama2/70B": 68_976_648_192,
    "llama3/8B": 8_030_261_248,
    "llama3/70B": 70_553_706_496,
    "llama3/405B": 405_853_388_800,
    "mistral/7B": 7_241_732_096,
    "qwen2/1-5B": 1_543_714_304,
    "gemma2/2B": 2_614_341_888,
    "gemma3/1B": 999_885_952,
    "olmo2/7B": 7_298_617_344,
    "olmo3/7B": 7_298_011_136,
    "smollm3/3B": 3_075_098_624,
    "phi3/mini": 3_821_079_552,
    "cohere2/7B": 8_028_033_024,
    "granite/2B": 2_533_531_648,
    "starcoder2/7B": 7_173_923_840,
    "apertus/8B": 8_053_338_176,
    "bert/110M": 110_106_428,
    "roberta/125M": 124_697_433,
    "dpr/110M": 2 * 108_891_648,  # BERT base of transformers without its pooler, twice
    "ict/110M": 2 * (108_891_648 + 128 * 769),
    "t5/60M": 60_506_624,
    "t5/250M": 247_577_856,
    "t5/11B": 11_135_332_352,
    "qwen3_moe/30B-A3B": 30_532_122_624,
    "qwen3_5/9B": 8_953_803_264,  # of transformers' class
    "qwen3_next/80B-A3B": 79_674_391_296,  # of transformers' class, without the module that predicts further tokens
    "qwen2_moe/14B-A2-7B": 14_315_784_192,
    "olmoe/7B-A1B": 6_919_161_856,
    "deepseek_v2/16B-A2-4B": 15_706_484_224,
    "deepseek_v3/671B-A37B": 671_026_404_352,  # of transformers' class, without the block that predicts a second token
    "gpt_oss/20B": 20_914_757_184,
    "mamba2/130M": 128_989_632,
    "nemotron_h/8B": 8_100_852_736,
    "nemotron_h/30B-A3B": 31_577_937_344,
    "glm4_moe/106B-A12B": 106_852_245_504,  # of transformers' class, without the block that predicts further tokens
}
"""As in the papers and on the model cards of the Hugging Face hub (arXiv:2204.06745; arXiv:2304.01373, table 1;
huggyllama, meta-llama, mistralai and the authors of the others)."""


def resolved(path: Path) -> Config:
    ranks, files = intended(path)
    flags = {"user_script": "generate.py"} if path.stem == "text_generation" else {}
    return resolve(files, flags, Resources(ranks, "cuda")).config


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_resolves_at_its_world_size(path: Path) -> None:
    config = resolved(path)
    ranks, _ = intended(path)
    assert config.parallelism.world_size == ranks
    training = config.training
    assert training.train_batch_size == (
        (training.train_micro_batch_size_per_gpu or 0)
        * (training.gradient_accumulation_steps or 0)
        * config.parallelism.data_parallel_size
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_reports_where_its_numbers_come_from(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "num_layers" in text and path.stem != "quickstart":
        assert "arXiv:" in text or "no source" in text
        assert re.search(r"Ranks:[\s#]+\d+", text)


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    ranks, files = intended(CONFIGS / f"{name}.yml")
    assert make_plan(resolve(files, {}, Resources(ranks, "cuda"))).parameters == PARAMETERS[name]


@pytest.mark.parametrize("path", [path for path in FILES if "num_layers" in path.read_text()], ids=name_of)
def test_it_fits_the_accelerators_it_is_laid_out_for(path: Path) -> None:
    ranks, files = intended(path)
    plan = make_plan(resolve(files, {}, Resources(ranks, "cuda")))
    if plan.memory is None:
        assert "vocab" in str(plan.unknown) or "not counted yet" in str(plan.unknown)
        return
    budget = 40 if name_of(path) == "20B" or name_of(path).startswith("pythia/") else 80
    assert plan.memory.total < 0.9 * budget * GIB
