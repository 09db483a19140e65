"""The experts of a mixture, packed: stacked parameters, grouped products, PEFT's adapters on them."""
