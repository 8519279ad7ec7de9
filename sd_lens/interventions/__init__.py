"""Hooks that change a forward pass: the explosion subspace ablated, patched and steered, and what comes of it."""
