"""The transformer: one list of layers, each mapping (text, image, text_length) to the same."""
