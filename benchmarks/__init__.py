"""Speed and memory, as ratios against the alternative in the same run: ``python -m benchmarks.<name>``."""
