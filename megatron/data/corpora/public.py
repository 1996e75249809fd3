"""Where the corpora with public names are fetched from.

The names and the places are those of GPT-NeoX's `prepare_data.py`; further places that hold the same files follow. Most
of the places belong to others and some no longer answer: then the message says what to do. A checksum stands here where
one is published; for the rest the first complete download is written down in SHA256SUMS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron.data.corpora.download import DownloadSource

_COMPONENTS = "https://the-eye.eu/public/AI/pile_preliminary_components"
_C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main"
_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
_S3 = "https://s3.amazonaws.com/models.huggingface.co/bert"

GPT2_VOCAB = DownloadSource(
    "gpt2-vocab.json",
    (f"{_BPE}/encoder.json", f"{_S3}/gpt2-vocab.json"),
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)
GPT2_MERGES = DownloadSource(
    "gpt2-merges.txt",
    (f"{_BPE}/vocab.bpe", f"{_S3}/gpt2-merges.txt"),
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)


@dataclass(frozen=True)
class PublicCorpus:
    """A corpus that is fetched."""

    name: str
    """Name on the command line."""
    doc: str
    """One line about it."""
    folder: str
    """Its name below the data directory, which is that of the token files too."""
    sources: tuple[DownloadSource, ...]
    """Its files."""
    documents: int | None = None
    """How many there are, where it is known."""
    workers: int | None = None
    """At most so many processes tokenise it."""


def _one(name: str, doc: str, *urls: str, folder: str | None = None, documents: int | None = None) -> PublicCorpus:
    """A corpus of one file, named as at its first place."""
    return PublicCorpus(name, doc, folder or name, (DownloadSource(urls[0].rpartition("/")[2], urls),), documents)


def _component(name: str, doc: str, file: str, documents: int | None = None) -> PublicCorpus:
    return _one(name, doc, f"{_COMPONENTS}/{file}", documents=documents)


def _pile(number: int) -> DownloadSource:
    return DownloadSource(f"{number:02}.jsonl.zst", (f"https://the-eye.eu/public/AI/pile/train/{number:02}.jsonl.zst",))


def _c4(part: str, count: int, *before: str) -> tuple[DownloadSource, ...]:
    """The files of a part of C4. before: folders that are tried before the one of its authors."""
    names = [f"c4-train.{number:05}-of-{count:05}.json.gz" for number in range(count)]
    return tuple(DownloadSource(name, tuple(f"{url}/{name}" for url in (*before, f"{_C4}/{part}"))) for name in names)


_ENWIK8 = PublicCorpus(
    "enwik8",
    "the first 100 MB of the English Wikipedia of 2006, one document",
    "enwik8",
    (
        DownloadSource(
            "enwik8.zip",
            ("https://data.deepai.org/enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"),
            member_sha1=("enwik8", "57b8363b814821dc9d47aa4d41f58733519076b2"),
        ),
    ),
    documents=1,
    workers=1,
)

PUBLIC_CORPORA: Mapping[str, PublicCorpus] = MappingProxyType(
    {
        corpus.name: corpus
        for corpus in [
            _one("enron", "e-mails", "http://eaidata.bmk.sh/data/enron_emails.jsonl.zst", documents=517_401),
            PublicCorpus("pile_subset", "the first of the Pile's 30 files", "pile_00", (_pile(0),)),
            PublicCorpus("pile", "the Pile, 30 files", "pile", tuple(map(_pile, range(30)))),
            _one("github", "a part of the Pile's code", "http://eaidata.bmk.sh/data/github_small.jsonl.zst"),
            _component("arxiv", "papers", "2020-09-08-arxiv-extracts-nofallback-until-2007-068.tar.gz"),
            _component("europarl", "European Parliament", "EuroParliamentProceedings_1996_2011.jsonl.zst"),
            _component("freelaw", "opinions of courts", "FreeLaw_Opinions.jsonl.zst"),
            _component("nih", "abstracts of grants", "NIH_ExPORTER_awarded_grant_text.jsonl.zst"),
            _component("pubmed", "PubMed Central", "PMC_extracts.tar.gz"),
            _component("books1", "books", "books1.tar.gz"),
            _component("books3", "books", "books3.tar.gz"),
            _component("hackernews", "comments", "hn.tar.gz", documents=373_000),
            _component("openwebtext2", "pages", "openwebtext2.jsonl.zst.tar", documents=17_103_000),
            _component("stackexchange", "questions and answers", "stackexchange_dataset.tar"),
            _component("ubuntu_irc", "conversations", "ubuntu_irc_until_2020_9_1.jsonl.zst"),
            _component("youtube_subtitles", "subtitles", "yt_subs.jsonl.zst"),
            PublicCorpus("c4", "C4, English, 1,024 files", "c4", _c4("en", 1024)),
            PublicCorpus(
                "c4_openwebtext",
                "C4 like news, 512 files",
                "c4_openwebtext",
                _c4("realnewslike", 512, "https://the-eye.eu/eleuther_staging/c4/realnewslike"),
            ),
            _ENWIK8,
        ]
    }
)
