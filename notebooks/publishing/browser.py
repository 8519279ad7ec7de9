"""Pages in a headless Chromium, offline: their elements after their scripts have run, and their looks."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--proxy-server=127.0.0.1:9",  # whatever is fetched fails
    "--virtual-time-budget=15000",
)
_FRAME = 200


def chromium() -> str | None:
    """Where Chromium is, None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def dom(page: str, *, width: int) -> str:
    """A page's elements after its scripts have run.

    Args:
        page: The page, as HTML.
        width: Of the window, in pixels.
    """
    return _run(page, f"--window-size={width},2000", "--dump-dom")[0].decode()


def screenshot(page: str, *, width: int, height: int, scale: float) -> bytes:
    """The upper left of a page, as PNG, with some blank rows below.

    Args:
        page: The page, as HTML.
        width: Of the picture, in CSS pixels.
        height: Its height.
        scale: Pixels of the picture per CSS pixel.
    """
    # The page is given less than the window's height, and the rest of the picture stays blank.
    size = f"--window-size={width},{height + _FRAME}"
    return _run(page, size, f"--force-device-scale-factor={scale:g}", "--screenshot=shot.png")[1]


def _run(page: str, *options: str) -> tuple[bytes, bytes]:
    program = chromium()
    if program is None:
        raise RuntimeError("chromium: not found; needed: Chromium on the path (Debian package: chromium)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [program, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, (folder / "page.html").as_uri()]
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=True)
        shot = folder / "shot.png"
        return done.stdout, shot.read_bytes() if shot.exists() else b""
