"""The command line: a thin skin over the API. Exit code 0: done; 2: bad input, said in one line on stderr; 1: anything else."""

# The modules register their commands in the order in which --help lists them.
# isort: skip_file

from sd_lens.cli.app import app, main
from sd_lens.cli import finding, spectrum, explaining, patching, signature, dynamics, quantizing, collapsing

__all__ = ["app", "collapsing", "dynamics", "explaining", "finding", "main", "patching", "quantizing", "signature", "spectrum"]
