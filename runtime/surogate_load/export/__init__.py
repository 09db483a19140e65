"""Dense checkpoints made of artifacts: dequantized, or with an adapter merged into them."""
