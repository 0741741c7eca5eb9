"""Small real data that ships with a library or lies on the machine already, turned into shards."""
