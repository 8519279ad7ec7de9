"""``python -m sd_lens``: the same as the ``sd-lens`` command."""

from sd_lens.cli import main

main()
