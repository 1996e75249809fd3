"""Files and flags become one Config, or every error at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.config import FIELDS, Config, Resources, resolve
from megatron.config.type_names import allows_type
from megatron.config.validation.unsupported import IGNORED_HINTS, UNUSED_KEYS
from megatron.errors import ConfigError
from tests.config.small import SMALL, errors, resolved, write

ALL_REASONS = {**IGNORED_HINTS, **UNUSED_KEYS}


def test_the_origin_of_every_value_is_retained(tmp_path: Path) -> None:
    text = "".join(f"{name}: {value}\n" for name, value in SMALL.items())
    path = write(tmp_path, "small.yml", text)
    resolution = resolve([path], {"seed": 7}, Resources(2))
    assert resolution.origin.keys() == FIELDS.keys()
    assert resolution.origin["num_layers"] == f"{path}:1"
    assert resolution.origin["seed"] == "command line"
    assert resolution.origin["train_batch_size"] == "derived"
    assert resolution.origin["eval_iters"] == "default"
    assert resolution.config.checkpoint.config_files == {"small.yml": text}


def test_resources_may_depend_on_the_launch_keys() -> None:
    found: list[Any] = []

    def resources(launch: Any) -> Resources:
        found.append(launch.num_gpus)
        return Resources(launch.num_gpus, "cuda")

    config = resolve([], {**SMALL, "num_gpus": 4}, resources).config
    assert found == [4]
    assert config.parallelism.world_size == 4
    assert config.training.train_batch_size == 8
    assert config.launch.distributed_backend == "nccl"


def test_every_issue_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yml", "num_layers: two\nhiden_size: 64\nnorm: rmsnrm\nfinetune: 1\nlr: true\n")
    with pytest.raises(ConfigError) as error:
        resolve([path], {"eval_tasks": [1]})
    assert str(error.value).splitlines() == [
        f"{path}:1: num_layers = 'two': this is text; give a whole number or null",
        f"{path}:2: hiden_size: there is no such key; did you mean hidden_size?",
        f"{path}:3: norm = 'rmsnrm': there is no such choice; did you mean rmsnorm? The choices are layernorm, "
        "rmsnorm, rmsnorm_1p, layernorm_1p, non_parametric_layernorm, scalenorm, te_rmsnorm, te_layernorm",
        f"{path}:4: finetune = 1: this is a whole number; give true or false",
        f"{path}:5: lr = True: this is true or false; give a number or null",
        "command line: eval_tasks = [1]: item 1 is a whole number; give a list of texts or null",
        "num_attention_heads: the key is not given; every model needs it",
        "seq_length: the key is not given; every model needs it",
        "train_micro_batch_size_per_gpu: neither train_batch_size nor train_micro_batch_size_per_gpu is given; give "
        "one of them (train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data parallel "
        "size: ? = ? x ? x 1)",
        "train_iters: the length of the run is not given; give train_iters",
    ]


def test_choices_whatever_their_case_and_full_floats() -> None:
    config = resolved(norm="RMSNorm", train_iters=1e2, pos_emb="ROTARY", precision="BFloat16").config
    assert (config.model.norm, config.model.pos_emb, config.precision.precision) == ("rmsnorm", "rotary", "bfloat16")
    assert config.training.train_iters == 100
    assert type(config.training.train_iters) is int
    assert errors(train_iters=1.5) == ["command line: train_iters = 1.5: this is a number; give a whole number or null"]


def test_one_path_is_a_list_of_one() -> None:
    config = resolved(train_data_paths="a").config
    assert config.data.train_data_paths == ("a",)
    assert config.data.train_data_weights == (1.0,)


def test_the_older_sparsity_says_what_each_block_attends_to() -> None:
    kinds = {value: resolved(sparsity=value).config.model.attention_config for value in ("none", "all", "interspersed")}
    assert kinds["none"] == resolved().config.model.attention_config
    assert set(kinds["all"] or ()) == {"sparse_variable"}
    assert (kinds["interspersed"] or ())[:3] == ("global", "sparse_variable", "global")[: len(kinds["all"] or ())]
    assert resolved(sparsity="interspersed", num_layers=3).config.model.attention_config == (
        "global",
        "sparse_variable",
        "global",
    )
    assert "it is none, all or interspersed" in errors(sparsity="some")[0]
    assert "keep one of the two" in errors(sparsity="all", attention_config=[[["global"], "all"]])[0]


def test_older_keys_are_understood_or_refused_by_name() -> None:
    resolution = resolved(gas=4, detect_nvlink_pairs=True, save_interval=10, save="x")
    assert resolution.config.training.gradient_accumulation_steps == 4
    assert resolution.config.checkpoint.checkpoint_factor == 10
    assert any("detect_nvlink_pairs" in line for line in resolution.warnings)
    assert errors(attention_type="flash")[0].startswith(
        "command line: attention_type = 'flash': this is a key of another release or program; write"
    )
    assert errors(gas=2, gradient_accumulation_steps=2) == [
        "command line: gas = 2: this is an older name of gradient_accumulation_steps, which is given at command line; "
        "keep one of the two"
    ]


def test_the_older_spellings_of_bfloat16_are_understood() -> None:
    pythia = {"fp16": {"enabled": True, "type": "bfloat16", "loss_scale": 0, "initial_scale_power": 12}}
    for changes in (pythia, {"fp16": {"type": "bf16"}}, {"precision": {"type": "bfloat16"}}):
        resolution = resolved(**changes)
        assert resolution.config.precision.precision == "bfloat16"
        assert resolution.config.precision.fp16 is None
        assert [line for line in resolution.warnings if "read as precision: bfloat16" in line]
    assert resolved(fp16={"enabled": False, "type": "bfloat16"}).config.precision.precision == "fp32"
    assert resolved(precision="bf16", **pythia).config.precision.precision == "bfloat16"
    (line,) = errors(precision="fp32", **pythia)
    assert "a block of type bfloat16 asks for bfloat16, and precision, at command line, for another one" in line
    assert any(
        "gas = 2: an older name, read as gradient_accumulation_steps" in line for line in resolved(gas=2).warnings
    )


def test_features_that_are_not_built_resolve_and_are_named() -> None:
    resolution = resolved(adlr_autoresume=True, lazy_mpu_init=True)
    reported = "\n".join(resolution.not_supported_yet)
    for part in ("adlr_autoresume = True", "lazy_mpu_init = True"):
        assert part in reported
    assert resolved().not_supported_yet == []


@pytest.mark.parametrize("precision", ["fp16", "bfloat16"])
def test_half_precision_runs_under_zero(precision: str) -> None:
    """Without a block it gets stage 1, and where a public configuration says stage 0 too, with one warning."""
    assert resolved(precision=precision).config.deepspeed.zero_stage == 1
    assert resolved(precision=precision).warnings == []
    resolution = resolved(precision=precision, zero_optimization={"stage": 0})
    assert resolution.config.deepspeed.zero_stage == 1
    assert resolution.not_supported_yet == []
    (reported,) = resolution.warnings
    assert "zero_optimization = {stage: 0}: runs as stage 1" in reported
    assert resolved(zero_optimization={"stage": 0}).config.deepspeed.zero_stage == 0


def test_keys_without_effect_warn_once_each_and_may_be_errors() -> None:
    resolution = resolved(attention_softmax_in_fp32=True, te_fp8_margin=2, deepscale=False)
    assert len(resolution.warnings) == 2
    assert resolution.warnings[0].startswith("command line: attention_softmax_in_fp32 = True: has no effect")
    with pytest.raises(ConfigError, match="strict_config makes this an error"):
        resolved(attention_softmax_in_fp32=True, strict_config=True)


NEEDS = {"fp16_lm_cross_entropy": {"precision": "fp16"}}
"""What else a key asks for."""


def test_options_that_no_block_reads_are_reported() -> None:
    reported = "\n".join(resolved(gpt_j_tied=True, sparsity_config={"block": 8}).warnings)
    assert "gpt_j_tied = True: has no effect; gpt_j_residual is off" in reported
    assert "has no effect; no block is of a sparse kind" in reported
    local = resolved(attention_config=[[["local"], "all"]], sliding_window_width=8, sparsity_config={"block": 8})
    assert any("sliding_window_width = 8: has no effect" in line for line in local.warnings)
    assert not any("sparsity_config" in line for line in local.warnings)


@pytest.mark.parametrize("name", [name for name in ALL_REASONS if len(FIELDS[name].choices) != 1])
def test_a_key_without_effect_is_one_warning_line_with_its_position(name: str, tmp_path: Path) -> None:
    field = FIELDS[name]
    others = [choice for choice in field.choices if choice != field.default]
    examples = {bool: not field.default, int: 7, float: 7.0, str: "x", dict: {"a": 1}}
    others += [value for kind, value in examples.items() if allows_type(field.annotation, kind)]
    value = others[0] if others else "x"
    path = write(tmp_path, "a.yml", f"# one line above\n{name.replace('_', '-')}: {json.dumps(value)}\n")
    small = {**SMALL, **NEEDS.get(name, {})}
    found = resolve([path], small, Resources(1))
    assert [line for line in found.warnings if name in line] == [
        f"{path}:2: {name} = {value!r}: has no effect; {ALL_REASONS[name]}"
    ]
    with pytest.raises(ConfigError, match="strict_config makes this an error"):
        resolve([path], {**small, "strict_config": True}, Resources(1))


def test_what_only_srun_takes_is_a_warning_elsewhere() -> None:
    reported = "command line: comment: has no effect, since only srun takes it"
    assert reported in resolved(comment="x").warnings
    assert resolved(comment="x", account="y", launcher="slurm").warnings == []
    assert len(resolved(comment="x", account="y").warnings) == 2


def test_a_file_that_cannot_be_read_has_no_echo(tmp_path: Path) -> None:
    broken = write(tmp_path, "model.yml", "num_layers: [2\n")
    other = write(tmp_path, "run.yml", "train_iters: 10\nseed: -3\nnorm: rmsnrm\n")
    with pytest.raises(ConfigError) as error:
        resolve([broken, other, tmp_path / "gone.yml"])
    assert [issue.location for issue in error.value.issues] == [
        f"{broken}:2",
        f"{other}:2",
        f"{other}:3",
        str(tmp_path / "gone.yml"),
    ]


def test_older_names_have_no_echo() -> None:
    reported = errors(num_layers=None, num_hidden_layers=2, train_micro_batch_size_per_gpu=None, micro_batch_size=2)
    assert len(reported) == 2


def test_a_resolved_configuration_resolves_to_itself() -> None:
    config = resolved(4, precision="bfloat16", model_parallel_size=2).config
    again = resolve([], config.flat(), Resources(4)).config
    assert again == config


def test_inference_needs_no_batch_and_no_length() -> None:
    flags = {"train_iters": None, "train_micro_batch_size_per_gpu": None, "optimizer": None}
    for script in ("generate.py", "tools/run_text_generation_server.py", "bits_per_byte.py", "tools/perplexity.py"):
        config = resolved(8, user_script=script, train_batch_size=3, **flags).config
        assert config.training.train_micro_batch_size_per_gpu == 1
    assert errors(8, user_script="train.py", **flags) != []
    inference = resolved(precision="bfloat16", checkpoint_activations=True, hidden_dropout=0.1).config.for_inference()
    assert inference.deepspeed.zero_stage == 0
    assert inference.model.hidden_dropout == 0.0
    assert not inference.recompute.checkpoint_activations


def test_config_is_frozen_and_replaced() -> None:
    config = resolved().config
    with pytest.raises(ValueError, match="frozen"):
        config.model.num_layers = 3  # type: ignore[misc]
    assert config.replace(num_layers=3).model.num_layers == 3
    assert config.model.num_layers == 2
    with pytest.raises(ConfigError, match="did you mean num_layers"):
        config.replace(num_layer=3)
    with pytest.raises(ConfigError, match="norm = 'x' is not one of"):
        Config.from_flat({"norm": "x"})


def test_resolving_and_planning_import_no_torch() -> None:
    code = (
        "import sys\nfrom megatron.config import resolve, Resources\n"
        "from megatron.config import deepspeed_config, serialize\n"
        "from megatron.plan import make_plan\n"
        f"make_plan(resolve([], {SMALL!r}, Resources(2))).text()\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NULLABLE_TEXTS = [
    name
    for name, field in FIELDS.items()
    if allows_type(field.annotation, type(None))
    and (allows_type(field.annotation, str) or allows_type(field.annotation, tuple))
]


@pytest.mark.parametrize("name", NULLABLE_TEXTS)
def test_the_text_none_is_no_null(name: str, tmp_path: Path) -> None:
    """`save: None` is text in YAML, and would name a folder."""
    path = write(tmp_path, "none.yml", f"{name}: None\n")
    expected = f"{path}:1: {name} = 'None': this is Python's spelling; write null, or leave the key out"
    with pytest.raises(ConfigError) as error:
        resolve([path], {key: value for key, value in SMALL.items() if key != name})
    assert expected in str(error.value).splitlines()


@pytest.mark.parametrize("name", ["launcher_args", "eval_results_prefix"])
def test_the_text_none_is_not_the_empty_text(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = 'None': this is Python's spelling; leave the key out"):
        resolved(**{name: "None"})


def test_the_text_none_in_a_flag_and_within_a_text() -> None:
    with pytest.raises(ConfigError, match=r"eval_tasks = \['None'\]: this is Python's spelling"):
        resolved(eval_tasks=["None"])
    assert resolved(wandb_group="None of these", wandb_team=None).config.observe.wandb_group == "None of these"
