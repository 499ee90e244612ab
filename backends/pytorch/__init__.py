"""What the `cuda` and `sdpa` backends share: everything but the choice of kernels."""
