"""Programs of the offline data pipeline: `megavideo render-clips`, `megavideo tokenize-videos`, ..."""
