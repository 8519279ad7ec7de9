"""What the findings are good for: what a quantiser must spare, whose child a checkpoint is, how the direction settles in training."""
