"""What a person wants to see of finished runs: curves, predicted frames, one page of figures."""
