"""Generation from a checkpoint: the wiring, in order.

What the user asked for is checked before anything costly starts; then the process group, the tokenizer, the model with
its weights, and the texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.distributed as dist

from megatron.checkpoint.load import vocabulary_rows
from megatron.config import Config
from megatron.engine.build import build_inference_engine
from megatron.engine.engine import Engine
from megatron.errors import ConfigError
from megatron.inference import modes
from megatron.inference.answer import Settings
from megatron.inference.generate import TextGenerator
from megatron.inference.sampling import Sampling
from megatron.parallel.bootstrap import bootstrap, shutdown
from megatron.parallel.topology import Topology
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.build import build_tokenizer
from megatron.tokenizers.padding import padded_vocab_size


def generate(config: Config) -> None:
    """Makes the texts that the configuration asks for. Collective over all ranks; rank 0 writes.

    Raises ConfigError before the model is loaded, RunError when the checkpoint cannot be used or nothing was generated.
    """
    config = config.for_inference()
    section = config.generation
    mode = modes.chosen_mode(section.text_gen_type, section.sample_input_file)
    contexts = _contexts(config, mode)

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        generator = TextGenerator(engine, tokenizer, _settings(config))
        speaks = topology.rank == 0
        if mode == modes.INTERACTIVE:
            modes.converse(generator, section.prompt_end, speaks=speaks, share=_share)
        else:
            path = modes.output_path(section.sample_output_file, section.sample_input_file)
            modes.run_over(generator, contexts, path, writes=speaks, show=sys.stdout)

    with_model(config, work)


def with_model(config: Config, work: Callable[[Engine, Tokenizer, Topology], None]) -> None:
    """Calls work with the model of the checkpoint that `load` names, ready to be asked. Collective over all ranks.

    config: one that `for_inference` made. Raises ConfigError or RunError when the checkpoint cannot be used.
    """
    topology = bootstrap(
        pipe_parallel_size=config.parallelism.pipe_parallel_size,
        model_parallel_size=config.parallelism.model_parallel_size,
        seed=config.training.seed,
        backend=config.launch.distributed_backend,
        timeout_seconds=config.launch.collective_timeout,
        deterministic=config.training.deterministic,
    )
    try:
        tokenizer = build_tokenizer(config.tokenizer)
        vocabulary = padded_vocab_size(
            tokenizer.vocab_size, config.tokenizer.make_vocab_size_divisible_by, topology.model.size
        )
        vocabulary = vocabulary_rows(config, vocabulary, tokens=tokenizer.vocab_size, model_size=topology.model.size)
        work(build_inference_engine(config, topology, vocabulary), tokenizer, topology)
    finally:
        shutdown()


def context_length(config: Config) -> int:
    """The most tokens that the model reads at once."""
    if config.model.seq_length is None:
        raise ConfigError.of("the length of the model's context is not given", key="seq_length", value=None)
    return config.model.seq_length


def _contexts(config: Config, mode: str) -> list[str]:
    """The contexts of a run over given prompts, each as often as samples are wanted."""
    section = config.generation
    if mode == modes.INTERACTIVE:
        return []
    prompts = [""] if mode == modes.UNCONDITIONAL else modes.read_prompts(section.sample_input_file, section.prompt_end)
    return [prompt for prompt in prompts for _ in range(section.num_samples)]


def _settings(config: Config) -> Settings:
    section = config.generation
    return Settings(
        sampling=Sampling(
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
        ),
        seed=config.training.seed,
        maximum_tokens=section.maximum_tokens,
        seq_length=context_length(config),
        recompute=section.recompute,
        stop=tuple(section.stop or ()),
        return_logits=section.return_logits,
        batch_size=section.generation_batch_size,
    )


def _share(prompt: str | None) -> str | None:
    """Rank 0's prompt, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return prompt
    held = [prompt]
    dist.broadcast_object_list(held, src=0)
    return held[0]
