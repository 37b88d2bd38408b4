"""Videos from text: cached decoding, the stages that follow each other, files."""
