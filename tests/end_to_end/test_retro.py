"""From token files to a model that attends to neighbours: the database, training in every layout, a resume.

Neighbours are held against a search in numpy over embeddings of transformers' encoder, the model against a loop in
tests/model/test_retro.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.data.dataset.builder import build_data
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.engine.inference_forward import gather_vocabulary
from megatron.errors import ConfigError
from megatron.inference.batch_generation import TextGenerator
from megatron.inference.generation_request import Settings
from megatron.inference.runner import with_loaded_model
from megatron.inference.sampling import Sampling
from megatron.model.retro_model import run_retro
from megatron.param_table import RetroDims
from megatron.retrieval.retriever import with_retrieval
from megatron.training.retro_setup import build_retro_database
from tests.end_to_end.runs import BASE, run_all, series
from tests.multi_rank import RankFailedError, run_distributed

CHUNK, SAVED = 8, 3
LETTERS = "abcdefghijklmnop"
MODEL: dict[str, Any] = {
    **BASE,
    "num_layers": 3,
    "hidden_size": 32,
    "num_kv_heads": 4,
    "retro_add_retriever": True,
    "retro_chunk_length": CHUNK,
    "retro_cross_attention_layers": [1, 2],
    "retro_query_num_neighbors_save": SAVED,
    "train_iters": 4,
    "eval_interval": 2,
    "eval_iters": 1,
}
LAYOUTS = {
    "tensor 2": {"model_parallel_size": 2},
    "data 2, ZeRO 1": {"zero_optimization": {"stage": 1}},
    "data 2, ZeRO 2": {"zero_optimization": {"stage": 2}},
    "data 2, ZeRO 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


def make_texts(folder: Path, documents: int = 60) -> str:
    """Documents of random letters in chunks; every second one repeats the middle of the one before."""
    generator = np.random.default_rng(3)
    letters = np.frombuffer(LETTERS.encode(), np.uint8)
    shared = np.empty((3, CHUNK), np.uint16)
    with DatasetWriter(folder / "text", np.dtype(np.uint16)) as writer:
        for number in range(documents):
            own = generator.choice(letters, (6 + number % 5, CHUNK)).astype(np.uint16)
            if number % 2:
                own[1:4] = shared
            shared = own[1:4]
            writer.add_document(own.flatten()[: None if number % 3 else -3])
    return str(folder / "text")


def make_repeats(folder: Path, passages: int) -> str:
    """Documents of eight chunks; the six in the middle are also those of one other document."""
    generator = np.random.default_rng(3)
    letters = np.frombuffer(LETTERS.encode(), np.uint8)
    shared = generator.choice(letters, (passages, 6, CHUNK))
    with DatasetWriter(folder / "text", np.dtype(np.uint16)) as writer:
        for number in generator.permutation(np.repeat(np.arange(passages), 2)):
            first, last = generator.choice(letters, (2, 1, CHUNK))
            writer.add_document(np.concatenate([first, shared[number], last]).flatten().astype(np.uint16))
    return str(folder / "text")


def make_encoder(folder: Path, seed: int = 1) -> str:
    """A small BERT over letters, with random weights."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


def build_rank(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    script = {"user_script": "build_retro_database.py"}
    build_retro_database(resolve([], {**settings, **script}, Resources(world_size)).config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run whose database two ranks have built."""
    folder = tmp_path_factory.mktemp("retro")
    paths = {"retro_embedder": make_encoder(folder / "bert"), "retro_project_dir": str(folder / "database")}
    settings = {**MODEL, **paths, "data_path": make_texts(folder), "log_dir": str(folder / "logs")}
    run_distributed(build_rank, 2, settings)
    return settings


def test_neighbors_of_validation_samples_are_of_other_documents_by_any_name(
    made: dict[str, Any], tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{made['data_path']}{suffix}")
    named = {"train_data_paths": [made["data_path"]], "valid_data_paths": [str(tmp_path / "link")]}
    steps = {"train_iters": 1, "eval_interval": 1, "retro_project_dir": str(tmp_path / "database")}
    settings = {**{key: value for key, value in made.items() if key != "data_path"}, **named, **steps}
    run_distributed(build_rank, 1, {**settings, "log_dir": str(tmp_path)})
    chunks, found = (np.load(tmp_path / "database" / f"{name}.npy") for name in ("chunks", "neighbors_valid"))
    texts = IndexedDataset(made["data_path"])
    assert len(chunks) == sum(-(-int(size) // CHUNK) for size in texts.sizes)
    config = resolve([], {**train_settings(settings), "retro_add_retriever": False}, Resources(1)).config
    samples = read_samples(config, train=8, valid=len(found))["valid"]
    for number, neighbors in enumerate(found):
        own = {origin.document for origin in samples.documents(number)}
        assert not own & set(chunks[neighbors.flatten(), 1].tolist())


def train_settings(made: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {key: value for key, value in made.items() if key not in ("retro_embedder", "log_dir")}
    return {**{key: value for key, value in own.items() if key != "retro_query_num_neighbors_save"}, **more}


def test_neighbors_are_those_of_other_documents_that_numpy_finds(made: dict[str, Any], tmp_path: Path) -> None:
    """By an index too, of which all cells are compared."""
    folder, other = Path(made["retro_project_dir"]), tmp_path / "database"
    by_index = {"retrieval_index": "ivf", "retrieval_ivf_probes": 1000, "retro_project_dir": str(other)}
    run_distributed(build_rank, 2, {**made, **by_index})
    assert json.loads((other / "retro.json").read_text())["index"] == "ivf 1000"
    databases = [np.load(one / "neighbors_train.npy") for one in (folder, other)]
    chunks, found = np.load(folder / "chunks.npy"), databases[0]
    tokens = IndexedDataset(made["data_path"])
    tokenizer, encoder = (kind.from_pretrained(made["retro_embedder"]) for kind in (AutoTokenizer, AutoModel))

    def vector(ids: np.ndarray) -> np.ndarray:
        rows = tokenizer(bytes(ids.astype(np.uint8)).decode(), return_tensors="pt")
        with torch.no_grad():
            return encoder(**rows).last_hidden_state[0, 1:-1].mean(0).double().numpy()

    texts = [tokens.get(document, first, length) for _, document, first, length in chunks.tolist()]
    assert np.concatenate(texts).tobytes() == b"".join(
        tokens[number].tobytes() for number in sorted(set(chunks[:, 1].tolist()))
    )
    vectors = np.stack([vector(text) for text in texts])
    assert databases[1].shape == found.shape
    assert found.shape == (MODEL["train_iters"] * MODEL["train_batch_size"], MODEL["seq_length"] // CHUNK, SAVED)
    splits = resolve([], {**train_settings(made), "retro_add_retriever": False}, Resources(1)).config
    samples = read_samples(splits, train=len(found))["train"]
    for number in (0, 7, 31):
        sample = np.empty(MODEL["seq_length"] + 1, np.int64)
        samples.read(number, sample)
        own = {origin.document for origin in samples.documents(number)}
        assert not any(own & set(chunks[rows[number].flatten(), 1].tolist()) for rows in databases)
        others = np.flatnonzero(~np.isin(chunks[:, 1], list(own)))
        for chunk, *both in zip(sample[:-1].reshape(-1, CHUNK), *(rows[number] for rows in databases), strict=True):
            distances = np.linalg.norm(vectors[others] - vector(chunk), axis=1)
            best = np.sort(distances)[:SAVED]
            for neighbors in both:
                np.testing.assert_allclose(np.linalg.norm(vectors[neighbors] - vector(chunk), axis=1), best, rtol=1e-4)


def read_samples(config: Any, *, train: int, valid: int = 16) -> dict[str, Any]:
    """The samples of training and validation, as a run reads them."""
    sizes = {"seq_length": MODEL["seq_length"], "seed": config.training.seed, "micro_batch": 8, "eod": 256}
    ranks = {"data_rank": 0, "data_size": 1, "is_builder": True, "barrier": lambda: None}
    data = build_data(config.data, **sizes, **ranks, train_samples=train, valid_samples=valid, test_samples=8)
    assert data.train is not None and data.valid is not None
    return {"train": data.train.samples, "valid": data.valid.samples}


def test_every_layout_trains_as_one_process(made: dict[str, Any], tmp_path: Path) -> None:
    settings = train_settings(made, retro_encoder_hidden_dropout=0.0, retro_encoder_attention_dropout=0.0)
    cases = {
        "one": settings,
        "recomputed": {**settings, "checkpoint_activations": True},
        "accumulated": {**settings, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
    }
    one = run_all(1, tmp_path / "one", cases)
    two = run_all(2, tmp_path / "two", {name: {**settings, **more} for name, more in LAYOUTS.items()})
    losses = {name: series(records, "train/lm_loss") for name, records in {**one, **two}.items()}
    valid = {name: series(records, "validation/lm_loss") for name, records in {**one, **two}.items()}
    for name, found in losses.items():
        assert found == pytest.approx(losses["one"], rel=1e-5), name
        assert valid[name] == pytest.approx(valid["one"], rel=1e-5), name
    assert losses["one"][-1] < losses["one"][0] - 0.05


def test_a_resume_is_bitwise_with_dropout(made: dict[str, Any], tmp_path: Path) -> None:
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    settings = train_settings(made, zero_optimization={"stage": 1})
    parts = run_all(
        2,
        tmp_path,
        {"full": settings, "first": {**settings, **saved, "exit_interval": 2}, "then": {**settings, **saved}},
    )
    full = series(parts["full"], "train/lm_loss")
    assert series(parts["first"], "train/lm_loss") + series(parts["then"], "train/lm_loss") == full
    other = shutil.copytree(made["retro_project_dir"], tmp_path / "other")
    facts = json.loads((other / "retro.json").read_text())
    facts["probe"][0] += 1.0
    (other / "retro.json").write_text(json.dumps(facts))
    with pytest.raises(RankFailedError, match="was trained with the neighbours of another database"):
        run_all(2, tmp_path / "on", {"on": {**settings, **saved, "retro_project_dir": str(other)}})


def test_a_trained_model_goes_on_with_neighbors(made: dict[str, Any], tmp_path: Path) -> None:
    """With finetune what reads neighbours is added, and the rest is the model's; without it that is refused."""
    save = str(tmp_path / "save")
    plain = {key: value for key, value in train_settings(made).items() if not key.startswith("retro_")}
    longer = {"train_iters": 60, "eval_interval": 60, "save": save, "checkpoint_factor": 60}
    still = {"optimizer": {"type": "Adam", "params": {"lr": 0.0}}, "min_lr": 0.0}
    settings = train_settings(made, load=save, model_parallel_size=2, **still)
    before = run_all(1, tmp_path / "plain", {"plain": {**plain, **longer}})["plain"]
    after = run_all(2, tmp_path / "on", {"on": {**settings, "finetune": True}})["on"]
    first, last = (series(before, "train/lm_loss")[at] for at in (0, -1))
    assert last < first - 1.0
    assert series(after, "train/lm_loss")[0] == pytest.approx(last, abs=0.2)
    with pytest.raises(RankFailedError, match="set finetune: true to start them beside the checkpoint's model"):
        run_all(1, tmp_path / "refused", {"one": train_settings(made, load=save, override_lr_scheduler=True)})


def logits_rank(rank: int, world_size: int, settings: dict[str, Any], text: torch.Tensor, joined: torch.Tensor) -> Any:
    """Logits of a text whose neighbours are found, those with given ones, and the text that follows it."""
    config = resolve([], {**settings, "user_script": "generate.py"}, Resources(world_size)).config.for_inference()
    found: list[Any] = []

    def work(engine: Any, tokenizer: Any, topology: Any) -> None:
        finding = with_retrieval(config, engine, tokenizer)
        found.append(finding.logits(text))
        with torch.inference_mode():
            given = run_retro(engine.stage.functions, RetroDims.of(config.model), joined)
        found.append(gather_vocabulary(given, topology))
        sampled = Settings(Sampling(temperature=0.0), 1, 9, MODEL["seq_length"], recompute=True)
        found.extend(
            each.length for each in TextGenerator(finding, tokenizer, sampled).continue_tokens(text.tolist(), [0])
        )

    with_loaded_model(config, work)
    return found


def test_a_text_goes_on_with_neighbors_that_are_found(made: dict[str, Any], tmp_path: Path) -> None:
    saved = {"save": str(tmp_path / "save"), "checkpoint_factor": 4}
    run_all(1, tmp_path / "run", {"one": train_settings(made, **saved)})
    folder, tokens = Path(made["retro_project_dir"]), IndexedDataset(made["data_path"])
    chunks, vectors = np.load(folder / "chunks.npy"), np.load(folder / "embeddings" / "vectors.npy")
    picked = np.flatnonzero(chunks[:, 3] == CHUNK)[[3, 30]]  # a text of two chunks of the database and some tokens
    text = np.concatenate([tokens.get(*chunks[number][1:]) for number in picked] + [tokens.get(3, 1, 3)])
    rows = []
    for number in picked:
        distances = np.linalg.norm(vectors - vectors[number], axis=1)
        for near in np.argsort(distances, kind="stable")[:2]:
            _, document, first, _ = chunks[near].tolist()
            own = tokens.get(document)[first : first + 2 * CHUNK]
            rows.append(np.concatenate([own, np.full(2 * CHUNK - len(own), 256)]))
    given = torch.from_numpy(text.astype(np.int64))[None]
    joined = torch.cat((torch.from_numpy(np.concatenate(rows).astype(np.int64))[None], given), dim=1)
    settings = {**train_settings(made, load=saved["save"], recompute=True), "retro_embedder": made["retro_embedder"]}
    alone = run_distributed(logits_rank, 1, settings, given, joined)[0]
    torch.testing.assert_close(alone[0], alone[1])
    both = run_distributed(logits_rank, 2, {**settings, "model_parallel_size": 2}, given, joined)
    other = make_encoder(tmp_path / "other", seed=2)
    with pytest.raises(RankFailedError, match="was made with another encoder"):
        run_distributed(logits_rank, 1, {**settings, "retro_embedder": other}, given, joined)
    with pytest.raises(RankFailedError, match="retro_num_neighbors = 1"):
        run_distributed(logits_rank, 1, {**settings, "retro_num_neighbors": 1}, given, joined)
    with pytest.raises(ConfigError, match="transformers has no attention to neighbours"):
        export(open_model(Path(saved["save"])), tmp_path / "theirs")
    for rank in both:
        torch.testing.assert_close(rank[0], alone[0], rtol=1e-5, atol=1e-5)
        assert rank[2] == alone[2] == 9


def test_neighbors_of_other_samples_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    for changed, named in (
        ({"seed": 7}, "train"),
        ({"retro_chunk_length": 16}, "chunk_length"),
        ({"train_iters": 3}, "train"),
    ):
        with pytest.raises(RankFailedError, match=f"neighbours are those of another run: {named}"):
            run_all(1, tmp_path / named, {"one": train_settings(made, **changed)})
    facts = json.loads((Path(made["retro_project_dir"]) / "retro.json").read_text())
    assert facts["train"]["samples"] == MODEL["train_iters"] * MODEL["train_batch_size"]
    with pytest.raises(RankFailedError, match=r"there is no database.*run tools/build_retro_database\.py"):
        run_all(1, tmp_path / "none", {"one": train_settings(made, retro_project_dir=str(tmp_path))})


@pytest.mark.long
def test_repeated_passages_cost_less_with_neighbors(tmp_path: Path) -> None:
    """Of random letters a language model learns the frequencies alone; six chunks of eight are those of a neighbour."""
    steps = {"train_iters": 400, "eval_interval": 400, "eval_iters": 20, "log_interval": 50, "train_batch_size": 16}
    sizes = {"seq_length": 64, "max_position_embeddings": 64, "num_layers": 2, "hidden_size": 64, "pos_emb": "learned"}
    settings = {**MODEL, **steps, **sizes, "retro_cross_attention_layers": [0, 1], "init_method_std": 0.1}
    settings |= {"retro_encoder_hidden_dropout": 0.0, "retro_encoder_attention_dropout": 0.0, "split": "99,1,0"}
    settings |= {"optimizer": {"type": "Adam", "params": {"lr": 3.0e-3}}, "gradient_clipping": 1.0, "weight_decay": 0.0}
    paths = {"retro_embedder": make_encoder(tmp_path / "bert"), "retro_project_dir": str(tmp_path / "database")}
    settings |= {**paths, "data_path": make_repeats(tmp_path, 4000), "retro_query_num_neighbors_save": 2}
    run_distributed(build_rank, 2, {**settings, "log_dir": str(tmp_path / "logs")}, timeout=900)
    own = train_settings(settings)
    plain = {key: value for key, value in own.items() if not key.startswith("retro_")}
    found = run_all(1, tmp_path / "runs", {"retro": own, "plain": plain}, timeout=900)
    losses = {name: series(records, "validation/lm_loss")[-1] for name, records in found.items()}
    assert losses["plain"] == pytest.approx(np.log(len(LETTERS)), rel=0.01)
    assert losses["retro"] < 0.8 * losses["plain"]
