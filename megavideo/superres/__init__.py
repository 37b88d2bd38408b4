"""Super-resolution of frames' tokens: direct (one forward pass) and iterative (six rounds)."""
