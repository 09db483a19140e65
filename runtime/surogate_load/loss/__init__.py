"""The loss of a causal language model whose head is frozen: made in chunks, the logits never whole."""
