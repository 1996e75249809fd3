"""Text generation."""

from megatron.config.field import Section, key
from megatron.config.types import Integers, Strings


class GenerationSection(Section):
    """Prompts in, text out."""

    text_gen_type: str | None = key(
        None,
        "input-file when sample_input_file is given, else unconditional, when left out.",
        choices=("unconditional", "input-file", "interactive", "precompute"),
    )
    temperature: float = key(0.0, "Divides the logits; 0 takes the most likely token.")
    top_k: int = key(0, "Sample among this many most likely tokens; 0 is all.", unit="tokens")
    top_p: float = key(
        0.0, "Sample among the most likely tokens of this total probability; 0 is all.", unit="probability"
    )
    min_p: float = key(0.0, "Drop tokens less likely than this fraction of the most likely one.", unit="fraction")
    repetition_penalty: float = key(1.0, "Divides the logits of tokens already seen, arXiv:1909.05858; 1 is none.")
    stop: Strings | None = key(None, "Texts at which generation ends.")
    eos_token_ids: Integers | None = key(
        None, "Further tokens at which generated text ends, beside the one that ends a document.", unit="token ids"
    )
    maximum_tokens: int | None = key(
        None,
        "Longest continuation, in the service where a request names none; when left out, 64 in generate.py, and in the "
        "service 16 of a completion and all that fit of a chat.",
        unit="tokens",
    )
    prompt_end: str = key("\n", "Ends a prompt in a prompt file or on the terminal.")
    sample_input_file: str | None = key(None, "File of prompts.")
    sample_output_file: str | None = key("samples.txt", "File for the results, one JSON object a line.")
    num_samples: int = key(1, "Samples of each prompt.", unit="samples")
    recompute: bool = key(False, "Run the full context again for each token instead of caching keys and values.")
    generation_batch_size: int = key(8, "Sequences generated together.", unit="sequences")
    num_speculative_tokens: int = key(
        0,
        "Tokens that the modules of mtp_num_layers draft for each pass of the model in generate.py and the text "
        "service, which chooses them or others; texts are those without drafts. 0 drafts none.",
        unit="tokens",
    )
    return_logits: bool = key(False, "Write the logits of the generated tokens as well.")
    precompute_model_name: str | None = key(None, "Name in the files that text_gen_type precompute writes.")
    serve_host: str = key("127.0.0.1", "Address that the text service listens on; this machine only, when left out.")
    serve_port: int = key(5000, "Port that the text service listens on.")
    serve_key: str | None = key(None, "Key that requests to the text service must carry; none when left out.")
    serve_max_waiting: int = key(64, "Requests that may wait for their turn; further ones get 429.", unit="requests")
