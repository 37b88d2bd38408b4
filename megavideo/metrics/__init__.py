"""How far generated clips are from real ones: Fréchet video distance and Inception Score."""
