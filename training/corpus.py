"""The text the model learns: what the standard library of any Python installation says about itself.

Docstrings and comments of its modules, and the language reference in ``pydoc_data.topics``. Nothing is downloaded. The
text depends on the Python version alone, so its digest identifies a corpus.
"""

from __future__ import annotations

import ast
import hashlib
import io
import logging
import platform
import pydoc_data.topics
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

# Distributions differ in whether they install the test suite, and some of its files are broken on purpose.
LEFT_OUT_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Shorter pieces are mostly markers such as "XXX" or a lone divider.
MIN_CHARACTERS = 24
HELD_OUT_EVERY = 50
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Corpus:
    """Text split into a training and a held-out part.

    Attributes:
        train: Documents joined by blank lines.
        held_out: Every fiftieth document, joined the same way.
        documents: Number of documents in both parts.
        skipped: What was left out, and how often.
        python: Version of Python whose standard library was read.
    """

    train: str
    held_out: str
    documents: int
    python: str
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole text, which identifies the corpus."""
        return hashlib.sha256((self.train + "\0" + self.held_out).encode()).hexdigest()


def library_files(root: Path) -> list[Path]:
    """Source files of the standard library in an order that does not depend on the file system.

    Args:
        root: Folder of the standard library.

    Returns:
        Paths sorted by their POSIX name below the folder.
    """
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in files if not LEFT_OUT_FOLDERS.intersection(path.parts))
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions.

    Args:
        source: Python source.

    Yields:
        Each docstring with its indentation removed.

    Raises:
        SyntaxError: If the source does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings are not this module's business
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def comments(source: str) -> Iterator[str]:
    """Comments that have lines of their own, neighbouring lines joined into one piece.

    Args:
        source: Python source.

    Yields:
        Each block of comment lines without its marks.
    """
    block: list[str] = []
    last_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string.strip():
            continue
        if token.start[0] != last_line + 1 and block:
            yield "\n".join(block).strip()
            block = []
        block.append(token.string.strip("#").removeprefix(" ").rstrip(" -=*"))
        last_line = token.start[0]
    if block:
        yield "\n".join(block).strip()


def collect(sources: Iterable[tuple[str, str]]) -> tuple[list[str], dict[str, int]]:
    """Gather the distinct pieces of text of many source files.

    Args:
        sources: Names and contents of the files.

    Returns:
        The pieces in order of first appearance, and counts of what was left out, by reason.
    """
    pieces: dict[str, None] = {}
    skipped = {"files that do not parse": 0, "pieces too short": 0, "pieces seen before": 0}
    for name, source in sources:
        try:
            found = [*docstrings(source), *comments(source)]
        except (SyntaxError, tokenize.TokenError) as error:
            logger.warning("%s does not parse: %s", name, error)
            skipped["files that do not parse"] += 1
            continue
        for piece in found:
            if len(piece) < MIN_CHARACTERS:
                skipped["pieces too short"] += 1
            elif piece in pieces:
                skipped["pieces seen before"] += 1
            else:
                pieces[piece] = None
    return list(pieces), skipped


def read_sources(root: Path) -> Iterator[tuple[str, str]]:
    """Read the standard library's files.

    Args:
        root: Folder of the standard library.

    Yields:
        The name below the folder and the content of each file.
    """
    for path in library_files(root):
        with tokenize.open(path) as file:  # honours the coding line
            yield path.relative_to(root).as_posix(), file.read()


def build_corpus() -> Corpus:
    """Make the corpus from the running Python's standard library.

    Returns:
        The corpus; what it leaves out is counted in ``skipped`` and logged.
    """
    pieces, skipped = collect(read_sources(Path(sysconfig.get_paths()["stdlib"])))
    topics = pydoc_data.topics.topics
    pieces += [topics[name].strip() for name in sorted(topics)]
    held_out = pieces[::HELD_OUT_EVERY]
    train = [piece for index, piece in enumerate(pieces) if index % HELD_OUT_EVERY]
    logger.info("corpus: %d documents, left out: %s", len(pieces), skipped)
    return Corpus(
        train=SEPARATOR.join(train),
        held_out=SEPARATOR.join(held_out),
        documents=len(pieces),
        python=platform.python_version(),
        skipped=skipped,
    )
