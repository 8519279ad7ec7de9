"""From notebooks/*.py to the notebooks that are committed: executed, with pictures of what is interactive."""
