"""Which sd_lens is running, for results that are kept."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The installed version of sd_lens."""
    try:
        return installed_version("sd-lens")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
