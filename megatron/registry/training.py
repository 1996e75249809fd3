"""Components beside model and optimizer: schedules, tokenizers, objectives, metrics sinks."""

from __future__ import annotations

from megatron.registry.entry import Entry, ScheduleEntry, SinkEntry, TokenizerEntry
from megatron.registry.registry import Registry

INFINITE = ("min_lr", "infinite_constant_lr", "infinite_cooldown_fraction", "infinite_anneal_fraction")

SCHEDULES = Registry(
    "learning rate schedule",
    "lr_decay_style",
    [
        ScheduleEntry(
            "constant", "megatron.optim.lr_schedule:constant", "The maximum learning rate after warmup", settings=()
        ),
        ScheduleEntry("linear", "megatron.optim.lr_schedule:linear", "Falls on a straight line to zero or min_lr"),
        ScheduleEntry(
            "cosine", "megatron.optim.lr_schedule:cosine", "Falls on half a cosine to min_lr, arXiv:1608.03983"
        ),
        ScheduleEntry("exponential", "megatron.optim.lr_schedule:exponential", "Halves over the horizon"),
        ScheduleEntry(
            "inverse_sqrt", "megatron.optim.lr_schedule:inverse_sqrt", "Falls as 1/sqrt(step), arXiv:1706.03762"
        ),
        ScheduleEntry(
            "wsd",
            "megatron.optim.lr_schedule:wsd",
            "Constant, then decay at the end, arXiv:2404.06395",
            settings=("min_lr", "wsd_decay_fraction", "wsd_decay_style"),
        ),
        ScheduleEntry(
            "infinite_cosine",
            "megatron.optim.infinite_schedules:infinite_cosine",
            "Half a cosine to a constant rate, annealed at the end, arXiv:2403.08763",
            settings=INFINITE,
        ),
        ScheduleEntry(
            "infinite_inv_sqrt",
            "megatron.optim.infinite_schedules:infinite_inv_sqrt",
            "Inverse square root to a constant rate, annealed at the end, arXiv:2403.08763",
            settings=INFINITE,
        ),
        ScheduleEntry(
            "power",
            "megatron.optim.power_schedule:power",
            "A power of the tokens trained, then decay at the end, arXiv:2408.13359",
            settings=("min_lr", "wsd_decay_fraction", "wsd_decay_style", "power_amplitude", "power_exponent"),
        ),
    ],
)

TOKENIZERS = Registry(
    "tokenizer",
    "tokenizer_type",
    [
        TokenizerEntry(
            "HFTokenizer",
            "megatron.tokenizers.huggingface:HFTokenizer",
            "A tokenizer.json file",
            vocab_size="megatron.plan.vocabulary:tokenizer_json_size",
        ),
        TokenizerEntry(
            "CharLevelTokenizer",
            "megatron.tokenizers.char_level:CharLevelTokenizer",
            "One token a byte",
            files=(),
            vocab_size=512,
        ),
        TokenizerEntry(
            "GPT2BPETokenizer",
            "megatron.tokenizers.gpt2:GPT2BPETokenizer",
            "vocab.json and merges.txt of GPT-2",
            files=("vocab_file", "merge_file"),
            vocab_size="megatron.plan.vocabulary:vocab_json_size",
        ),
        TokenizerEntry(
            "HFGPT2Tokenizer",
            "megatron.tokenizers.pretrained:HFGPT2Tokenizer",
            "Tokenizers of GPT-2's class, folder or name",
        ),
        TokenizerEntry(
            "PretrainedFromHF", "megatron.tokenizers.pretrained:PretrainedFromHF", "A pretrained model's tokenizer"
        ),
        TokenizerEntry(
            "TiktokenTokenizer",
            "megatron.tokenizers.tiktoken:TiktokenTokenizer",
            "A vocabulary of tiktoken, by name or from its file",
            extra="data",
        ),
        TokenizerEntry(
            "SPMTokenizer",
            "megatron.tokenizers.sentence_piece:SPMTokenizer",
            "A sentencepiece .model",
            extra="sentencepiece",
        ),
        TokenizerEntry(
            "BertWordPieceLowerCase",
            "megatron.tokenizers.bert:BertWordPieceLowerCase",
            "Word pieces, in lower case",
            vocab_size="megatron.plan.vocabulary:vocab_txt_size",
        ),
        TokenizerEntry(
            "BertWordPieceCase",
            "megatron.tokenizers.bert:BertWordPieceCase",
            "Word pieces, cased",
            vocab_size="megatron.plan.vocabulary:vocab_txt_size",
        ),
    ],
)

OBJECTIVES = Registry(
    "objective",
    "train_impl",
    [
        Entry("normal", "megatron.objectives.language_model:LanguageModel", "Cross entropy of the next token"),
        Entry(
            "bert",
            "megatron.objectives.masked_language_model:MaskedLanguageModel",
            "Cross entropy of masked tokens, and of the order of two segments, arXiv:1810.04805",
        ),
        Entry(
            "t5",
            "megatron.objectives.language_model:LanguageModel",
            "Cross entropy of the spans that an encoder's input lacks, arXiv:1910.10683",
        ),
        Entry(
            "classification",
            "megatron.objectives.classification:Classification",
            "Cross entropy of the classes of texts, or of the answers of a question",
        ),
        Entry(
            "ict",
            "megatron.objectives.retrieval:Retrieval",
            "Which block of text a sentence is from, among those of the batch, arXiv:1906.00300",
        ),
        Entry(
            "dpr",
            "megatron.objectives.retrieval:Retrieval",
            "Which passage answers a question, among those of the batch, arXiv:2004.04906",
        ),
    ],
)

SINKS = Registry(
    "metrics sink",
    "sinks",
    [
        SinkEntry(
            "jsonl", "megatron.metrics.sinks.jsonl:JsonLines", "metrics.jsonl in the run directory", key="log_dir"
        ),
        SinkEntry(
            "tensorboard",
            "megatron.metrics.sinks.tensorboard:TensorBoard",
            "Event files",
            extra="tensorboard",
            key="tensorboard_dir",
        ),
        SinkEntry(
            "wandb",
            "megatron.metrics.sinks.wandb:WeightsAndBiases",
            "A Weights & Biases run",
            extra="wandb",
            key="use_wandb",
        ),
        SinkEntry("comet", "megatron.metrics.sinks.comet:Comet", "A Comet experiment", extra="comet", key="use_comet"),
    ],
)
