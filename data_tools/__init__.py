"""Programs of the offline data pipeline, from `render-clips` to `verify-shards`."""
