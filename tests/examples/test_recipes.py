"""The examples' scripts, whole, at small size."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.metrics.sinks.jsonl import read_metrics
from tests.examples.scripts import EXAMPLES, ROOT, SMALL, flags, run, write_text
from tests.examples.test_plans import containers, manifests

RUN = {
    **SMALL,
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "tokenizer_type": "CharLevelTokenizer",
    "data_path": "data/text_text_document",
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3}},
    "train_batch_size": 8,
    "save": "save",
    "load": "save",
    "checkpoint_factor": 20,
    "num_workers": 0,
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a small run and its token files."""
    write_text(tmp_path / "text.jsonl")
    python = str(ROOT / ".venv" / "bin" / "python")
    tool = [python, str(ROOT / "tools" / "preprocess_data.py"), "--input", "text.jsonl", "--output-prefix", "data/text"]
    run([*tool, "--tokenizer-type", "CharLevelTokenizer", "--append-eod"], tmp_path)
    (tmp_path / "run.yml").write_text(json.dumps(RUN))
    return tmp_path


def ended_well(folder: Path) -> None:
    """The run reached its last step and learned."""
    records = [each for each in read_metrics(folder / "save" / "logs") if "train/lm_loss" in each]
    assert records[-1]["iteration"] == 20
    assert records[-1]["train/lm_loss"] < records[0]["train/lm_loss"]
    assert (folder / "save" / "latest").read_text() == "global_step20"


@pytest.mark.long
def test_pbs_starts_a_process_for_each_line_of_its_node_file(work: Path) -> None:
    (work / "nodes").write_text(f"{socket.gethostname()}\n" * 2)
    variables = {"PBS_O_WORKDIR": str(work), "PBS_NODEFILE": str(work / "nodes"), "PBS_JOBID": "7.server"}
    said = run(["bash", str(EXAMPLES / "pbs" / "train.pbs")], Path("/"), NEOX=str(ROOT), CONF="run.yml", **variables)
    assert (work / "hostfile.7.server").read_text() == f"{socket.gethostname()} slots=2\n"
    assert "2 rank(s)" in said or "2 ranks" in said
    ended_well(work)


def pod(container: dict[str, Any], folder: Path, number: int, port: int) -> subprocess.Popen[str]:
    """A pod as a process of this machine, with one worker on the CPU."""
    given = {each["name"]: each["value"] for each in container["env"]}
    given |= {"NEOX": str(ROOT), "GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    given |= {"RANK": str(number), "WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": str(number), "OMP_NUM_THREADS": "1"}
    given["PATH"] = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
    words = [word.replace("29500", str(port)) for word in container["args"]]
    return subprocess.Popen(
        [*container["command"], *words],
        cwd=folder,
        env={**os.environ, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["pytorchjob.yaml", "indexed-job.yaml"])
def test_pods_find_each_other(name: str, work: Path) -> None:
    manifest = manifests(name)[-1]
    found = containers(manifest) * (2 if manifest["kind"] == "Job" else 1)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pods = [pod(container, work, number, port) for number, container in enumerate(found)]
    for each in pods:
        said, _ = each.communicate(timeout=400)
        assert each.returncode == 0, said
    ended_well(work)


@pytest.mark.long
def test_a_llama_goes_there_and_back(tmp_path: Path) -> None:
    """What comes out is read by transformers, and knows the text better than what went in."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    write_text(tmp_path / "text.jsonl")
    (tmp_path / "llama").mkdir()
    python, vocabulary = str(ROOT / ".venv" / "bin" / "python"), str(tmp_path / "llama" / "tokenizer.json")
    tool = [python, str(ROOT / "tools" / "train_tokenizer.py"), "--input", "text.jsonl", "--vocab-size", "512"]
    run([*tool, "--tokenizer-output-path", vocabulary], tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    small: dict[str, object] = {
        "seq_length": 64,
        "train_batch_size": 8,
        "train_iters": 62,
        "eval_interval": 60,
        "eval_iters": 2,
    }
    small |= {"precision": "fp32", "checkpoint_factor": 60, "num_gpus": 2}
    small["optimizer"] = {"type": "Adam", "params": {"lr": 2e-3}}
    script = [str(EXAMPLES / "continue_llama" / "run.sh"), "llama", "text.jsonl", "work"]
    run([*script, *flags(small), "--exit-interval", "60"], tmp_path, WORKERS="1")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "work" / "trained" / "tokenizer.json"))
    text = json.loads((tmp_path / "text.jsonl").read_text().splitlines()[-1])["text"]
    tokens = torch.tensor([tokenizer.encode(text)[:128]])
    losses = []
    for folder in (tmp_path / "llama", tmp_path / "work" / "trained"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses.append(float(model(tokens, labels=tokens).loss))
    assert losses[0] > 6.0 and losses[1] < losses[0] - 0.5, losses
    run([*script, *flags(small)], tmp_path, WORKERS="1")
    assert (tmp_path / "work" / "checkpoints" / "latest").read_text() == "global_step62"


def test_the_llama_script_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    script = str(EXAMPLES / "continue_llama" / "run.sh")
    for words, reported in ((["llama"], "usage: run.sh"), (["llama", "text", "work"], "it holds no config.json")):
        done = subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and reported in done.stderr
