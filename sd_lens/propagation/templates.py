"""Prompts around probes, in words of our own."""

from __future__ import annotations

TEMPLATES: dict[str, tuple[str, str]] = {
    "repeat-last": ("Here is a row of digits:\n", "\nThe digit at the very end of the row is"),
    "count-ones": ("Here is a row of digits:\n", "\nHow often the digit 1 stands in the row, as a number:"),
    "bernoulli": ("Here is a row of digits:\n", "\nHow often the digit 1 stands in the row, as a number:"),
    "copy-first": ("Here is a row of digits:\n", "\nThe digit at the very beginning of the row is"),
    "copy-last": ("Here is a row of digits:\n", "\nThe digit at the very end of the row is"),
    "sum": ("Work out this sum:\n", "\nThe result, as a number:"),
    "count-word": ("Here is a list of words:\n", "\nHow many words the list has, as a number:"),
}
"""Per probe, what stands before its content and after it, up to where the answer is to begin."""
