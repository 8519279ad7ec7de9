"""What a block's linear map and its spectrum cost, against the paper's way to them.

    python -m benchmarks.linear [--shapes 160M,1B,8B] [--samples 100000] [--device cpu|cuda] [--threads 1] [--quick]
    python -m benchmarks.linear --checkpoint [--blocks 4]
    python -m benchmarks.linear --write        both, saved as benchmarks/results/linear.md

Blocks have random weights and a planted defect. Two paths go from the same weights to the same numbers, the leading singular triplet of
attention, FFN and block and the eigenpair nearest the planted direction, in the same run, each in a process of its own:

- ``sampled``: Wang et al. (arXiv 2502.07004) as they do it, written here with none of sd_lens: all samples at once, least squares
  (LAPACK's ``gels``: torch's default on a CPU is several times slower, and on CUDA it is the only one), the dense maps, three full
  singular value decompositions, one full eigendecomposition. Run once. Where its memory would not fit into this machine, the part that
  depends on the samples is run with fewer of them at two sizes, extrapolated along a straight line, and marked.
- ``ours``: `sd_lens.linearize`, `sd_lens.leading_singular` three times, `sd_lens.eigen_nearest`. The fastest of three runs.

Peak memory is what is resident beyond the block's weights and a warm torch; on CUDA, what torch has allocated. A read of the weights is
the fastest product of the block's map with one vector.

``--checkpoint`` writes a Llama of 8B shapes with few blocks to a temporary folder, runs ``sd-lens spectrum`` on it, and compares its peak
resident memory with that of a process which imports the same libraries.
"""
