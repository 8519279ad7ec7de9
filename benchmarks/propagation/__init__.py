"""Benchmarks of information propagation."""
