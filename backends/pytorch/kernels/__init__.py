"""Kernels of our own, in Triton, for what PyTorch's compiler leaves in memory. Each is tried before it is used
(`trial.py`): it has to give the right numbers on this device, and to be faster there than plain operations."""
