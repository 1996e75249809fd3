"""Drafts by a model's own modules change no text: against the plain loop, and against modules without a cache."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.engine.builder import build_training_engine, init_topology
from megatron.engine.drafter import Drafter
from megatron.inference import runner
from megatron.inference.drafting_loop import DraftingLoop
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, TokenLoop, decode
from megatron.model.kv_cache import KVCache
from megatron.model.multi_token import FurtherToken
from megatron.model.sequential_model import SequentialModel
from tests.model.test_multi_token import BASE, LENGTH, VOCABULARY, build
from tests.multi_rank import run_distributed

DEPTHS, END = 2, 60
PROMPTS = ([7, 30, 41], [1], list(range(3, 15)), [50] * 4, [20, 21, 22, 23])
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.7, top_k=20, repetition_penalty=1.2)
LATENTS = {
    "multi_latent_attention": True,
    "kv_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "norm": "rmsnorm",
}


class Model:
    """A small model and its modules, which have learnt to count, as an engine and a drafter. Counts its passes."""

    def __init__(self, **changes: Any) -> None:
        self.module, self.dims, _ = build(DEPTHS, 1.0, **changes)
        self._learn(self.module)
        self.module.eval()
        self.calls = 0
        self.drafter = Drafter.of(
            list(self.module.sequential),
            DEPTHS,
            Topology.single(),
            partial(self._cache, [self.dims.num_layers - 1]),
        )

    @staticmethod
    def _learn(module: SequentialModel) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        draws = torch.Generator().manual_seed(3)
        for _ in range(60):
            first = torch.randint(0, VOCABULARY, (8, 1), generator=draws)
            rows = (first + torch.arange(LENGTH + 1)) % VOCABULARY
            targets = TokenTargets(rows[:, 1:].t(), torch.ones(LENGTH, 8) / (8 * LENGTH))
            module(rows[:, :-1], targets=targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    def _cache(self, blocks: list[int], batch: int, max_length: int) -> KVCache:
        latent = self.dims.latent
        heads = self.dims.num_kv_heads if latent is None else 1
        width = self.dims.head_dim if latent is None else latent.cached
        return KVCache(len(blocks), batch, heads, max_length, width, attending=blocks, latents=latent is not None)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return self._cache(list(range(self.dims.num_layers)), batch, max_length)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        self.calls += 1
        logits = self.module(tokens, cache).transpose(0, 1)
        return logits if at is None else logits.flatten(0, 1)[at]

    def texts(self, rows: int, sampling: Sampling, drafts: int, prompts: Any = PROMPTS) -> list[list[int]]:
        """The tokens of each text; without drafts by the plain loop."""
        started = [
            RunningSequence(
                prompt,
                Limits(frozenset({END}), 20 - number, LENGTH + 12),
                Sampler(sampling, vocab_size=VOCABULARY - 2, seed=5, text_index=number),
            )
            for number, prompt in enumerate(prompts)
        ]
        make = partial(DraftingLoop, drafter=self.drafter, tokens=drafts, vocab_size=VOCABULARY - 2)
        for _ in decode(self, started, rows=rows, make=make if drafts else TokenLoop):
            pass
        return [text.tokens for text in started]


MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "experts, grouped": {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "num_kv_heads": 2},
    "window": {"sliding_window_width": 6, "no_weight_tying": True},
    "latents": LATENTS,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(**MODELS[request.param])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_are_those_without_drafts(model: Model, sampling: Sampling) -> None:
    """Side by side or one by one, with one draft of a pass or with two; rows move as texts end."""
    plain = model.texts(3, sampling, 0)
    assert len({len(text) for text in plain}) > 1
    for rows, drafts in ((1, 2), (3, 2), (3, 1), (5, 2)):
        assert model.texts(rows, sampling, drafts) == plain, (rows, drafts)


def test_right_drafts_save_passes(model: Model) -> None:
    before = (model.drafter.counts.proposed, model.drafter.counts.accepted)
    (text,) = model.texts(1, GREEDY, DEPTHS, [[20, 21, 22, 23]])
    proposed = model.drafter.counts.proposed - before[0]
    accepted = model.drafter.counts.accepted - before[1]
    assert accepted > proposed / 2, "the modules have learnt to count"
    assert len(text) == 4 + 20
    assert proposed <= 2 * (20 - accepted), "each pass but the first gives one token and those that were right"


def test_drafts_are_those_of_modules_without_a_cache(model: Model) -> None:
    """Each draft of a text is what the module says of the text so far, its drafts before among them, computed anew."""
    drafted: list[tuple[list[int], list[int]]] = []

    class Watched(DraftingLoop):
        def _run(self) -> None:
            super()._run()
            drafted.extend((list(text.tokens), list(self._scored[id(text)].drafts)) for text in self.texts)

    text = RunningSequence([9, 3, 30], Limits(frozenset(), 14, 40), Sampler(SAMPLED, vocab_size=VOCABULARY, seed=1))
    other = RunningSequence([5] * 7, Limits(frozenset(), 9, 40), Sampler(SAMPLED, vocab_size=VOCABULARY, seed=2))
    make = partial(Watched, drafter=model.drafter, tokens=DEPTHS, vocab_size=VOCABULARY)
    for _ in decode(model, [text, other], rows=2, make=make):
        pass
    assert any(len(drafts) == DEPTHS for _, drafts in drafted)
    for tokens, drafts in drafted:
        assert drafts == uncached_drafts(model, tokens)[: len(drafts)]


@torch.no_grad()
def uncached_drafts(model: Model, tokens: list[int]) -> list[int]:
    """The drafts behind a text by the modules as training runs them: all positions at once."""
    layers, found = list(model.module.sequential), list(tokens)
    hidden = torch.tensor([tokens[:-1]])
    for layer in layers[: -DEPTHS - 1]:
        hidden = layer(hidden)  # of all tokens but the last
    for number, module in enumerate(layers[-DEPTHS:]):
        assert isinstance(module, FurtherToken)
        following = torch.tensor([found[number + 1 :]])
        hidden = module.norm(module.block(module.join(layers[0](following), hidden)))
        found.append(int(layers[-DEPTHS - 1](hidden[-1:])[0, 0].argmax()))
    return found[len(tokens) :]


def generated(rank: int, world_size: int, folder: str, drafts: tuple[int, ...]) -> None:
    """Writes texts of a stored model, which rank 0 of a lone process saves, with each number of drafts."""
    os.chdir(folder)
    runner.shutdown = lambda: None
    keys = {**BASE, "mtp_num_layers": DEPTHS, "train_batch_size": 2, "save": "save", "checkpoint_factor": 1}
    keys |= {"tokenizer_type": "CharLevelTokenizer", "model_parallel_size": world_size, "distributed_backend": "gloo"}
    config = resolve([], keys, Resources(world_size)).config
    if world_size == 1:
        engine = build_training_engine(config, init_topology(config), padded_vocab_size=512)
        Saver(config, engine, padded_vocab_size=512).save(Counters(0))
    keys["return_logits"] = True
    asked = {"user_script": "generate.py", "load": "save", "sample_input_file": "prompts.txt", "maximum_tokens": 8}
    for number in drafts:
        said = {"num_speculative_tokens": number, "sample_output_file": f"{world_size}.{number}.jsonl"}
        runner.generate(resolve([], {**keys, **asked, **said}, Resources(world_size)).config)


def test_generate_drafts_on_one_rank_and_on_two(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def read\nim\nclass\n")
    for ranks, drafts in ((1, (0, DEPTHS)), (2, (1, DEPTHS))):
        run_distributed(generated, ranks, str(tmp_path), drafts)
    files = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*.jsonl"))]
    assert len(files) == 4
    plain, *others = [[json.loads(line) for line in lines] for lines in files]
    for records in others:
        for record, expected in zip(records, plain, strict=True):
            assert (record["text"], record["length"]) == (expected["text"], 8)
            torch.testing.assert_close(
                *(torch.tensor(each["logits"]) for each in (record, expected)), rtol=1e-4, atol=1e-4
            )
