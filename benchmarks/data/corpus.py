"""Real text to measure on: Debian's documentation, or the standard library's text where there is no apt.

Written once into a cache folder: DOCUMENTS.jsonl, the same as WET files, plain and gzip, and a 32k byte-level BPE
trained on a sample. The text is normalized already, so that all contestants tokenize the same characters.
"""

import gzip
import io
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import xxhash

from data_pipeline.document import Document
from data_pipeline.normalize import Normalizer
from data_pipeline.sources import plan_splits, read_split
from data_pipeline.tally import Tally
from data_pipeline.tokenization import END_OF_TEXT, train_tokenizer
from trainer.data_config import DataConfig, TokenizerConfig

PACKAGES = (
    "python3.11-doc",
    "perl-doc",
    "manpages-zh",
    "manpages-ja",
    "manpages-de",
    "manpages-fr",
    "debian-handbook",
    "linux-doc-6.1",
)
LARGE_PACKAGES = ("cppreference-doc-en-html", "installation-guide-amd64", "rust-doc", "openjdk-17-doc")
SMALL_BYTES = 110_000_000
LARGE_BYTES = 440_000_000  # at most: the packages hold 335 MB
VOCAB_SIZE = 32_000
TOKENIZER_SAMPLE_BYTES = 20_000_000
_MIN_CHARS = 200  # shorter pages are redirections
_MAX_RAW_BYTES = 20_000_000
_TEXT_ENDS = (".html", ".txt", ".pod", ".rst", ".md", *(f".{section}" for section in range(1, 9)))


@dataclass(frozen=True)
class Corpus:
    folder: Path
    name: str
    origin: str
    """What the text is, for the heading."""

    @property
    def jsonl(self) -> Path:
        """Records with a text and an id."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def wet(self, compressed: bool) -> Path:
        return self.folder / f"{self.name}.warc.wet{'.gz' if compressed else ''}"

    def texts(self, max_bytes: int | None = None) -> list[str]:
        """All texts, or about so many bytes of jsonl, drawn by a hash of the text from all packages."""
        share = 1.0 if max_bytes is None else min(1.0, max_bytes / self.jsonl.stat().st_size)
        with open(self.jsonl, "rb") as lines:
            texts = (orjson.loads(line)["text"] for line in lines)
            return [text for text in texts if xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64]


def make_corpus(folder: Path, large: bool) -> Corpus:
    """The corpus in this cache folder; made where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    has_apt = shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None
    name = ("debian" if has_apt else "stdlib") + ("-large" if large else "")
    origin = "Debian's documentation" if has_apt else "NO apt HERE: the standard library's text, repeated with edits"
    corpus = Corpus(folder, name, origin)
    if not corpus.jsonl.exists():
        documents = _debian(folder, large) if has_apt else _repeated_stdlib(LARGE_BYTES if large else SMALL_BYTES)
        _write_jsonl(documents, corpus.jsonl, LARGE_BYTES if large else SMALL_BYTES)
    if not corpus.tokenizer.exists():
        temporary = folder / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        train_tokenizer(corpus.texts(TOKENIZER_SAMPLE_BYTES), TokenizerConfig(), VOCAB_SIZE, temporary, seq_length=2048)
        temporary.rename(corpus.tokenizer)
    return corpus


def make_wet(corpus: Corpus) -> None:
    """The same documents as warcio writes them, in gzip members and plain."""
    if corpus.wet(False).exists() and corpus.wet(True).exists():
        return
    from warcio.warcwriter import WARCWriter

    for compressed in (False, True):
        path = corpus.wet(compressed)
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as out:
            writer = WARCWriter(out, gzip=compressed, warc_version="WARC/1.0")
            for number, text in enumerate(corpus.texts()):
                record = writer.create_warc_record(
                    f"http://localhost/{number}",
                    "conversion",
                    payload=io.BytesIO(text.encode()),
                    warc_content_type="text/plain",
                )
                writer.write_record(record)
        temporary.rename(path)


def _write_jsonl(documents: Iterable[Document], path: Path, max_bytes: int) -> None:
    normalize, num_bytes = Normalizer((END_OF_TEXT,)), 0
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as out:
        for document in documents:
            for clean in normalize([document], Tally()):
                if len(clean.text) >= _MIN_CHARS:
                    num_bytes += out.write(orjson.dumps({"id": clean.id, "text": clean.text}) + b"\n")
            if num_bytes >= max_bytes:
                break
    temporary.rename(path)


# -------------------------------------------------------------------------------------------------------------- Debian


def _debian(folder: Path, large: bool) -> Iterator[Document]:
    for package in (*PACKAGES, *(LARGE_PACKAGES if large else ())):
        unpacked = folder / "unpacked" / package
        if not unpacked.exists():
            _download(package, folder / "packages", unpacked)
        paths = (path for path in sorted(unpacked.rglob("*")) if path.is_file() and not path.is_symlink())
        for path in paths:
            text = _text_of(path)
            if text:
                yield Document(f"{package}/{path.relative_to(unpacked)}", text)


def _download(package: str, packages: Path, unpacked: Path) -> None:
    packages.mkdir(parents=True, exist_ok=True)
    if not list(packages.glob(f"{package}_*.deb")):
        command = ["apt-get", "download", package]
        if subprocess.run(command, cwd=packages, capture_output=True).returncode:
            subprocess.run(["apt-get", "update"], check=True, capture_output=True)
            subprocess.run(command, cwd=packages, check=True, capture_output=True)
    (deb,) = packages.glob(f"{package}_*.deb")
    temporary = unpacked.with_name(f"{unpacked.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "-x", str(deb), str(temporary)], check=True)
    temporary.rename(unpacked)


def _text_of(path: Path) -> str | None:
    """Text of a page; None of what is none, such as a picture."""
    name = path.name.removesuffix(".gz")
    if not name.endswith(_TEXT_ENDS) or path.stat().st_size > _MAX_RAW_BYTES:
        return None
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if not name.endswith(".html"):
        return text
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(text, main_content=True)


# ------------------------------------------------------------------------------------------------- the standard library


def _repeated_stdlib(max_bytes: int) -> Iterator[Document]:
    """Its text again and again, every copy with other words in the place of some, drawn with a fixed seed."""
    data = DataConfig()
    documents = [
        document
        for split in plan_splits(data).splits
        for document in read_split(split, data.max_document_bytes, Tally())
    ]
    words = sorted({word for document in documents[:200] for word in document.text.split()})
    draw, num_bytes, copy = random.Random(1), 0, 0
    while num_bytes < max_bytes:
        for document in documents:
            text = _edited(document.text, words, draw) if copy else document.text
            num_bytes += len(text)
            yield Document(f"{document.id}#{copy}", text)
        copy += 1


def _edited(text: str, words: list[str], draw: random.Random) -> str:
    """One word in 20 replaced."""
    pieces = text.split(" ")
    for index in draw.sample(range(len(pieces)), len(pieces) // 20):
        pieces[index] = draw.choice(words)
    return " ".join(pieces)
