"""How the model is cut over tensor-parallel ranks. Knows nothing of DeepSpeed or video."""
