"""From video files and captions to batches of tokens."""
