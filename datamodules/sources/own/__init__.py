"""Anyone's own files, turned into shards: pictures, texts, clips (docs/own_data.md)."""
