"""One packed base on many ranks: DDP shares the data, FSDP2 the base as well."""
