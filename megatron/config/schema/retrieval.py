"""Encoders of queries and passages: their samples and scores (train_impl: ict or dpr)."""

from megatron.config.field import Section, key
from megatron.config.types import Integers, Strings


class RetrievalSection(Section):
    """Samples of the inverse cloze task and of questions with passages, and how embeddings are compared."""

    retrieval_score_scaling: bool = key(
        False, "Divide the products of embeddings by the square root of the hidden size, before the softmax."
    )
    retrieval_report_topk_accuracies: Integers = key(
        (1,),
        "For each number k: report how often the right passage is among the first k of its batch.",
        unit="passages",
    )
    titles_data_path: str | None = key(
        None, "Token files with the titles of data_path's documents, in the same order; a block begins with its title."
    )
    query_in_block_prob: float = key(
        0.1, "Probability that the block of a query still has the query's sentence.", unit="fraction"
    )
    use_one_sent_docs: bool = key(False, "Documents and ends of documents of one sentence are blocks too.")
    retrieval_hard_negatives: int = key(
        1, "Passages of a question's hard_negative_ctxs in a training sample.", unit="passages"
    )
    retrieval_other_negatives: int = key(
        0, "Passages of a question's negative_ctxs in a training sample.", unit="passages"
    )
    retrieval_valid_hard_negatives: int = key(
        30, "Most passages of a question's hard_negative_ctxs that an evaluation ranks.", unit="passages"
    )
    retrieval_valid_other_negatives: int = key(
        30, "Most passages of a question's negative_ctxs that an evaluation ranks.", unit="passages"
    )
    evidence_data_path: str | None = key(
        None,
        "Passages that tools/embed_passages.py embeds and tools/search_passages.py reads: a tsv of id, text, title.",
    )
    embedding_path: str | None = key(None, "Folder of the embeddings of evidence_data_path.")
    qa_data: Strings | None = key(
        None, "Files of questions and answers whose passages tools/search_passages.py finds: tsv or JSON lines."
    )
    retrieval_index: str = key(
        "exact",
        "How tools/search_passages.py and tools/build_retro_database.py find the nearest passages or chunks: exact; "
        "flat, among all by faiss; or ivf, among those of the nearest cells of an index beside the embeddings.",
        choices=("exact", "flat", "ivf"),
    )
    retrieval_ivf_probes: int = key(
        32, "Cells of an index of kind ivf whose passages or chunks are compared.", unit="cells"
    )
    retro_project_dir: str | None = key(
        None,
        "Folder of chunks and neighbours that tools/build_retro_database.py makes and a run with retro_add_retriever "
        "reads.",
    )
    retro_embedder: str | None = key(
        None, "Folder of the transformers encoder that tools/build_retro_database.py and generate.py embed chunks with."
    )
    retro_query_num_neighbors_save: int = key(
        20, "Neighbours of each chunk that tools/build_retro_database.py stores.", unit="neighbours"
    )
    retrieval_match: str = key(
        "string",
        "How an answer is found in a passage: its words one after the other, or as a regular expression.",
        choices=("string", "regex"),
    )
