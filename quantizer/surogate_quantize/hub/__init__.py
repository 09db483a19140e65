"""Sources on the Hub: resolved once, fetched shard by shard, checked and deleted."""
