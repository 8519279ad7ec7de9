"""Results written whole or not at all, one file or several together."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4


def require_writable(path: str | os.PathLike[str], *, argument: str = "out") -> None:
    """Refuses a path that `write_together` could not write to; for use before long work starts. Nothing is created.

    Args:
        path: Where a file is to be written.
        argument: The caller's name for it, for the message.

    Raises:
        ValueError: The folder does not exist or cannot be written to, or something other than a writable file is there already.
    """
    reason = _obstacle(Path(path))
    if reason:
        raise ValueError(
            f"{argument}: got {os.fspath(path)!r}, {reason}; allowed: a file in an existing folder that can be written to"
        )


def _obstacle(path: Path) -> str:
    """Why a file cannot be written there, empty if it can."""
    target = path.resolve()
    if not target.parent.exists():
        return "whose folder does not exist"
    if not target.parent.is_dir():
        return "whose folder is a file"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return "whose folder cannot be written to"
    if target.is_dir():
        return "which is a folder"
    # Replacing a device such as /dev/null would destroy it.
    if target.exists() and not target.is_file():
        return "which is not a regular file"
    if target.exists() and not os.access(target, os.W_OK):
        return "which is write-protected"
    try:
        # Permissions say nothing to root, and nothing of a file system that takes no files.
        with tempfile.TemporaryFile(dir=target.parent):
            return ""
    except OSError as error:
        return f"in whose folder no file can be made ({error.strerror})"


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Writes a text file, as UTF-8, whole or not at all.

    Args:
        text: The content.
        path: The file; one that exists is replaced and keeps its permissions.

    Raises:
        OSError: It cannot be written there. Nothing is left behind.
    """
    write_together({Path(path): text.encode("utf-8")})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes files under other names in their folders, then renames them; where that fails half-way, the old files come back.

    Args:
        contents: What every file is to hold. One that exists is replaced and keeps its permissions.

    Raises:
        OSError: They cannot be written there. Nothing is left behind.
    """
    targets = {path.resolve(): content for path, content in contents.items()}  # a link stays a link
    for path, target in zip(contents, targets, strict=True):
        reason = _obstacle(target)
        if reason:
            raise OSError(f"cannot write {os.fspath(path)!r}, {reason}")
    mark = uuid4().hex
    news, olds = (
        {target: target.with_name(f".sd_lens-{mark}-{target.name}.{kind}") for target in targets} for kind in ("new", "old")
    )
    replaced: list[Path] = []
    try:
        for target, content in targets.items():
            news[target].write_bytes(content)
            if target.exists():
                shutil.copymode(target, news[target])
                shutil.copy2(target, olds[target])
        for target in targets:
            os.replace(news[target], target)
            replaced.append(target)
    except OSError:
        for target in replaced:
            if olds[target].exists():
                os.replace(olds[target], target)
            else:
                target.unlink(missing_ok=True)
        raise
    finally:
        for temporary in (*news.values(), *olds.values()):
            temporary.unlink(missing_ok=True)
