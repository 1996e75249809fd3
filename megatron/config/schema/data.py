"""Datasets, splits and sample order."""

from megatron.config.field import Section, key
from megatron.config.types import Items, Numbers, Strings

PATHS = "as prefixes of .bin and .idx files"


class DataSection(Section):
    """Data sets, splits and packing."""

    data_path: str | None = key(None, "One data set, a prefix of .bin and .idx files, divided by `split`.")
    split: str = key("969, 30, 1", "Shares of train, validation and test documents of data_path.")
    train_data_paths: Strings | None = key(None, f"Training data sets, {PATHS}.")
    valid_data_paths: Strings | None = key(None, f"Validation data sets, {PATHS}.")
    test_data_paths: Strings | None = key(None, f"Test data sets, {PATHS}.")
    train_data_weights: Numbers | None = key(None, "Sampling weight of each training set; 1 each when left out.")
    valid_data_weights: Numbers | None = key(None, "Sampling weight of each validation set; 1 each when left out.")
    test_data_weights: Numbers | None = key(None, "Sampling weight of each test set; 1 each when left out.")
    valid_same_samples: bool = key(
        False, "Every evaluation reads the same validation samples; otherwise each continues after the previous one."
    )
    valid_loss_per_set: bool = key(
        False, "Report the loss of each of valid_data_paths as well, over eval_iters batches of its own."
    )
    weight_by_num_documents: bool = key(False, "Derive the weights from the number of documents of each set.")
    weighted_sampler_alpha: float = key(1.0, "Exponent of the document counts; below 1 favours small sets.")
    train_label_data_paths: Items | None = key(None, f"Labels of the training sets, {PATHS}.")
    valid_label_data_paths: Items | None = key(None, f"Labels of the validation sets, {PATHS}.")
    test_label_data_paths: Items | None = key(None, f"Labels of the test sets, {PATHS}.")
    train_reward_data_paths: Items | None = key(None, f"Rewards of the training sets, {PATHS}.")
    valid_reward_data_paths: Items | None = key(None, f"Rewards of the validation sets, {PATHS}.")
    test_reward_data_paths: Items | None = key(None, f"Rewards of the test sets, {PATHS}.")
    pos_train_data_paths: Strings | None = key(None, f"Preferred answers for training, {PATHS}.")
    neg_train_data_paths: Strings | None = key(None, f"Rejected answers for training, {PATHS}.")
    pos_train_label_data_paths: Items | None = key(None, f"Labels of the preferred training answers, {PATHS}.")
    neg_train_label_data_paths: Items | None = key(None, f"Labels of the rejected training answers, {PATHS}.")
    pos_valid_data_paths: Strings | None = key(None, f"Preferred answers for validation, {PATHS}.")
    neg_valid_data_paths: Strings | None = key(None, f"Rejected answers for validation, {PATHS}.")
    pos_valid_label_data_paths: Items | None = key(None, f"Labels of the preferred validation answers, {PATHS}.")
    neg_valid_label_data_paths: Items | None = key(None, f"Labels of the rejected validation answers, {PATHS}.")
    pos_test_data_paths: Strings | None = key(None, f"Preferred answers for testing, {PATHS}.")
    neg_test_data_paths: Strings | None = key(None, f"Rejected answers for testing, {PATHS}.")
    pos_test_label_data_paths: Items | None = key(None, f"Labels of the preferred test answers, {PATHS}.")
    neg_test_label_data_paths: Items | None = key(None, f"Labels of the rejected test answers, {PATHS}.")
    data_impl: str = key(
        "infer",
        "Format of the data files: mmap, cached (the legacy one) or what each .idx says.",
        choices=("infer", "mmap", "cached"),
    )
    dataset_impl: str = key("gpt2", "Kind of samples.", choices=("gpt2", "pairwise", "online"))
    pack_impl: str = key(
        "packed",
        "packed joins documents and splits them anywhere, pack_until_overflow joins complete documents, unpacked takes "
        "one document per sample.",
        choices=("packed", "pack_until_overflow", "unpacked"),
    )
    allow_chopped: bool = key(True, "Truncate documents longer than a sample where packing does not split; else drop.")
    reset_attention_mask: bool = key(False, "Tokens attend to their own document only.")
    reset_position_ids: bool = key(False, "Positions start again at each document.")
    eod_mask_loss: bool = key(False, "Leave out the loss of positions whose input is the end of a document.")
    num_workers: int = key(2, "Background workers of each data loader.", unit="processes")
    mmap_warmup: bool = key(False, "Read the data files once at the start, to fill the page cache.")
    use_shared_fs: bool = key(
        True, "All hosts see the same files: one rank builds the index maps, and there is one copy of a checkpoint."
    )
    mask_prob: float = key(0.15, "Share of the tokens that a masked language model is to predict.", unit="probability")
    mask_max_ngram: int = key(
        3, "Most words in a row that are masked together; 10 with train_impl t5 when left out.", unit="words"
    )
    mask_mean_words: float = key(
        5.0,
        "With train_impl t5: mean words of a span, of a geometric distribution that is cut off at mask_max_ngram, "
        "arXiv:1907.10529.",
        unit="words",
    )
    short_seq_prob: float = key(
        0.1, "Share of padded samples of a masked language model with a random shorter length.", unit="probability"
    )
