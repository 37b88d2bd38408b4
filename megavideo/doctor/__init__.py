"""`megavideo doctor`: would training work on these nodes? One verdict for each question."""
