"""lm-eval's requests through this project's model beside lm-eval's own `hf` model, with the same weights and tokenizer.

    python benchmarks/evaluation.py [--documents 24] [--batch 8] [--rounds 2] [--processor-time]

12 layers x 768, vocabulary 50,304, fp32. The requests are made of the standard library's source: choosing the line
that goes on among four, the likelihood of whole files in rolling windows, and writing 32 tokens on. Both sides are
timed from requests to scores, tokenizing included; the figure is the best of the rounds. Needs lm_eval and accelerate.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from benchmarks.generation import our_engine, twin
from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.trainer import train_byte_level_bpe

LENGTH = 512
Requests = dict[str, list[Instance]]


def requests(documents: int) -> Requests:
    """Requests of the three kinds."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    lines = [[line for line in text.splitlines() if len(line) > 30] for text in texts if len(text) > 8000][:documents]
    choosing = []
    for number, own in enumerate(lines):
        others = [lines[(number + step) % len(lines)][20] for step in (1, 2, 3)]
        choosing += [("\n".join(own[4:12]) + "\n", choice) for choice in (own[12], *others)]
    rolling = [(text[:4000],) for text in texts if len(text) > 4000][: max(1, documents // 4)]
    how = {"until": ["\n\n\n"], "max_gen_toks": 32, "do_sample": False}
    writing = [("\n".join(own[4:10]) + "\n", how) for own in lines[: max(1, documents // 2)]]
    return {
        "loglikelihood": [Instance("loglikelihood", {}, pair, 0) for pair in choosing],
        "loglikelihood_rolling": [Instance("loglikelihood_rolling", {}, text, 0) for text in rolling],
        "generate_until": [Instance("generate_until", {}, asked, 0) for asked in writing],
    }


def contenders(folder: Path, batch: int) -> dict[str, Any]:
    """Both models, as lm-eval sees them."""
    sources = (
        path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    )
    trained = train_byte_level_bpe(sources, 8000)
    trained.save(str(folder / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>", pad_token="<|padding|>")
    model = twin(torch.float32)
    with torch.no_grad():  # so that greedy texts have tokens of the tokenizer only, which both sides can write
        model.get_output_embeddings().weight[trained.get_vocab_size() :] = 0
    tokenizer = make_tokenizer("HFTokenizer", vocab_file=str(folder / "tokenizer.json"))
    rows = model.config.vocab_size
    ours = HarnessModel(
        our_engine(model, torch.float32), tokenizer, max_length=LENGTH, batch_size=batch, vocabulary=rows
    )
    return {"ours": ours, "hf": HFLM(pretrained=model, tokenizer=theirs, max_length=LENGTH, batch_size=batch)}


def main() -> None:
    """Prints a line for each kind of request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not time on the wall")
    asked = parser.parse_args()
    clock: Callable[[], float] = time.process_time if asked.processor_time else time.perf_counter
    print(f"batch {asked.batch}, {torch.get_num_threads()} threads", flush=True)
    prompts = requests(asked.documents)
    totals = {"ours": 0.0, "hf": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        models = contenders(Path(folder), asked.batch)
        for kind, some in prompts.items():
            best = dict.fromkeys(models, float("inf"))
            answers: dict[str, Any] = {}
            for _ in range(asked.rounds):
                for name, model in models.items():
                    started = clock()
                    answers[name] = getattr(model, kind)(some, disable_tqdm=True)
                    best[name] = min(best[name], clock() - started)
            for name in totals:
                totals[name] += best[name]
            rates = ", ".join(f"{name} {len(some) / seconds:.2f}" for name, seconds in best.items())
            print(
                f"{kind:22s} {best['hf'] / best['ours']:.2f}x ({rates} requests/s; {_agreement(answers)})", flush=True
            )
    print(f"{'together':22s} {totals['hf'] / totals['ours']:.2f}x", flush=True)


def _agreement(answers: dict[str, Any]) -> str:
    """How far the answers of both sides differ."""
    pairs = list(zip(answers["ours"], answers["hf"], strict=True))
    if isinstance(pairs[0][0], str):
        return f"{sum(one == other for one, other in pairs)} of {len(pairs)} texts equal"
    first = [(one[0], other[0]) if isinstance(one, tuple) else (one, other) for one, other in pairs]
    return f"scores differ by {max(abs(one - other) for one, other in first):.1e} at most"


if __name__ == "__main__":
    main()
