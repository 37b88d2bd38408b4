"""From logits to image tokens: strategies, clusters of codes, and draws that a seed fixes."""
