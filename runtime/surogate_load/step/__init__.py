"""Training steps with little host time: decoder layers compiled, micro-steps captured in CUDA graphs."""
