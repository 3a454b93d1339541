"""Images as tokens in files: `.rvq`, token shards, and back."""
