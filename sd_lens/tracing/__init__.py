"""What a forward pass shows: norms, high-norm tokens, the defect direction."""
