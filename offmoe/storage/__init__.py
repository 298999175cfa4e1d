"""Bytes at rest: the headers of shards, where an expert is in its files, reading and writing them."""
