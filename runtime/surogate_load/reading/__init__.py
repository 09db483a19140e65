"""Reads the weights of a packed model from its files, in transformers' place where nothing is to be converted."""
