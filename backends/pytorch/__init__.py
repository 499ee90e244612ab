"""PyTorch behind the contract: what every backend built on it shares."""
