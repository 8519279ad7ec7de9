"""Which model is looked at: loading, checking, block weights, planted ground truth."""
