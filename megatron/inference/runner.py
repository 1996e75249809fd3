"""Generation from a checkpoint: the wiring, in order.

What the user asked for is checked before anything costly starts; then the process group, the tokenizer, the model with
its weights, and the texts.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial

from megatron.checkpoint.load.loader import make_available
from megatron.config import Config
from megatron.config.validation.unknown_values import require
from megatron.distributed.init import shutdown
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import any_rank
from megatron.engine.builder import build_inference_engine, init_topology
from megatron.engine.drafter import Drafter
from megatron.engine.encoder_decoder import EncoderDecoderEngine
from megatron.engine.engine import Engine
from megatron.engine.inference_engine import InferenceEngine
from megatron.engine.vocabulary import build_vocabulary, vocabulary_size
from megatron.errors import ConfigError
from megatron.health.heartbeat import ASKING
from megatron.health.watchdog import Watchdog
from megatron.inference import batch_modes
from megatron.inference.batch_generation import TextGenerator
from megatron.inference.drafting_loop import DraftingLoop
from megatron.inference.generation_request import Settings
from megatron.inference.interactive import Interruption, run_interactive
from megatron.inference.precompute_logprobs import write_log_probabilities
from megatron.inference.prompt_broadcast import broadcast_prompt
from megatron.inference.sampling import Sampling
from megatron.inference.token_loop import TokenLoop
from megatron.log import get_logger
from megatron.param_table import ModelDims
from megatron.registry import POSITIONS
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.builder import build_tokenizer
from megatron.tokenizers.masking import span_tokens
from megatron.tokenizers.source import SourceTokenizer
from megatron.tokenizers.vocab_limit import full_tokenizer

GENERATED = 64
"""New tokens of a text where `maximum_tokens` is left out [tokens]."""


def generate(config: Config, wrap: Callable[[Config, Engine, Tokenizer], Engine] | None = None) -> None:
    """Makes the texts that the configuration asks for. Collective over all ranks; rank 0 writes.

    Raises ConfigError before the model is loaded, RunError when the checkpoint cannot be used or nothing was generated.

    config: of the model. wrap: returns the engine to generate with; the model's own unless given.
    """
    config = config.for_inference(drafts=True)
    section = config.generation
    if section.text_gen_type == batch_modes.PRECOMPUTE:
        precompute(config)
        return
    mode = batch_modes.chosen_mode(section.text_gen_type, section.sample_input_file)
    contexts = _contexts(config, mode)

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        drafter = drafter_of(engine)
        engine = engine if wrap is None else wrap(config, engine, tokenizer)
        generator = TextGenerator(engine, tokenizer, _settings(config), loop_maker(config, drafter, tokenizer))
        is_main_rank = topology.rank == 0
        if mode == batch_modes.INTERACTIVE:
            run_interactive(
                generator,
                section.prompt_end,
                is_main_rank=is_main_rank,
                share=partial(broadcast_prompt, limit=config.launch.collective_timeout),
                any_rank=any_rank,
                interruption=Interruption.install(
                    lambda text: print(text, end="", flush=True) if is_main_rank else None
                ),
            )
        else:
            path = batch_modes.output_path(section.sample_output_file, section.sample_input_file)
            batch_modes.run_over(generator, contexts, path, writes=is_main_rank, show=sys.stdout)
        if drafter is not None and is_main_rank:
            get_logger(__name__).info("%s", drafter.counts)

    with_loaded_model(config, work)


def drafter_of(engine: Engine) -> Drafter | None:
    """Returns the model with its modules that draft tokens, where these are built."""
    return engine.drafter if isinstance(engine, InferenceEngine) else None


def loop_maker(config: Config, drafter: Drafter | None, tokenizer: Tokenizer) -> Callable[..., TokenLoop]:
    """Returns what makes the token loop, with drafts where there is a drafter."""
    if drafter is None:
        return TokenLoop
    tokens = config.generation.num_speculative_tokens
    return partial(DraftingLoop, drafter=drafter, tokens=tokens, vocab_size=vocabulary_size(config, tokenizer))


def precompute(config: Config) -> None:
    """Writes the log-probabilities of the labels of every data set; see precompute_logprobs.py. Collective over all
    ranks.
    """
    data = config.data
    paths = [
        path for some in (data.train_data_paths, data.test_data_paths, data.valid_data_paths) for path in some or ()
    ]
    paths += [data.data_path] if data.data_path and not paths else []
    for key in ("train", "valid", "test"):
        paths += [path for side in ("pos", "neg") for path in getattr(data, f"{side}_{key}_data_paths") or ()]
    if not paths:
        raise ConfigError.of("there is no data set to work on", key="data_path", hint="set data_path")
    name = (
        config.generation.precompute_model_name or hashlib.sha256(str(config.checkpoint.load).encode()).hexdigest()[:16]
    )

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        for path in dict.fromkeys(str(each) for each in paths):
            write_log_probabilities(
                engine,
                path,
                f"{path}_{name}",
                max_length=context_length(config),
                batch_size=config.generation.generation_batch_size,
                overlap=config.evaluation.eval_overlap,
                writes=topology.rank == 0,
                vocabulary=vocabulary_size(config, tokenizer),
            )

    with_loaded_model(config, work)


def with_loaded_model(config: Config, work: Callable[[Engine, Tokenizer, Topology], None]) -> None:
    """Calls work with the model of the checkpoint that `load` names, ready to be asked. Collective over all ranks.

    config: one that `for_inference` made. Raises ConfigError or RunError when the checkpoint cannot be used.
    """
    topology = init_topology(config)
    watchdog = Watchdog(topology, config.observe.folder, config.launch.collective_timeout)
    try:
        with watchdog.guard():
            tokenizer = build_tokenizer(config.tokenizer)
            make_available(config.checkpoint, shared=config.data.use_shared_fs)
            tokenizer, rows = build_vocabulary(config, topology, tokenizer)
            check_ends(config.generation.eos_token_ids, tokenizer)
            facts = describe_tokenizer(config.tokenizer.tokenizer_type, full_tokenizer(tokenizer))
            built = build_inference_engine(config, topology, rows, facts)
            engine: Engine = built
            if config.model.encoder_num_layers is not None:
                spans = span_tokens(tokenizer, 0)
                engine = EncoderDecoderEngine.of(built, spans.start, ModelDims.of(config.model))
                tokenizer = SourceTokenizer(tokenizer, spans)
            with watchdog.activity(ASKING):
                work(engine, tokenizer, topology)
    finally:
        shutdown()


def check_ends(ids: Sequence[int] | None, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where `eos_token_ids` names tokens that the vocabulary does not have."""
    beyond = [number for number in ids or () if number >= tokenizer.vocab_size]
    if beyond:
        raise ConfigError.of(
            f"the vocabulary has {tokenizer.vocab_size:,} tokens, so there is no {', '.join(map(str, beyond))}",
            key="eos_token_ids",
            value=list(ids or ()),
            hint="give ids of this tokenizer",
        )


def context_length(config: Config) -> int:
    """The most tokens that the model reads at once, beside a learned prompt."""
    model = config.model
    if model.encoder_num_layers is not None and "embedding" in POSITIONS.entry(model.pos_emb).enters:
        return require(model.max_position_embeddings)  # either stack has that many positions
    if model.text_length is None:
        raise ConfigError.of("the length of the model's context is not given", key="seq_length", value=None)
    return model.text_length


def _contexts(config: Config, mode: str) -> list[str]:
    """The contexts of a run over given prompts, each as often as samples are wanted."""
    section = config.generation
    if mode == batch_modes.INTERACTIVE:
        return []
    prompts = (
        [""]
        if mode == batch_modes.UNCONDITIONAL
        else batch_modes.read_prompts(section.sample_input_file, section.prompt_end)
    )
    return [prompt for prompt in prompts for _ in range(section.num_samples)]


def own_sampling(config: Config) -> Sampling:
    """How the configuration says that tokens are chosen."""
    section = config.generation
    return Sampling(
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
    )


def _settings(config: Config) -> Settings:
    section = config.generation
    return Settings(
        sampling=own_sampling(config),
        seed=config.training.seed,
        maximum_tokens=GENERATED if section.maximum_tokens is None else section.maximum_tokens,
        seq_length=context_length(config),
        recompute=section.recompute,
        stop=tuple(section.stop or ()),
        end_ids=tuple(section.eos_token_ids or ()),
        return_logits=section.return_logits,
        batch_size=section.generation_batch_size,
    )
