"""``clipscale data``: make, check, describe and change shards. Each tool maps shards to shards."""
