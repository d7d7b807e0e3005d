"""What a run did, on one self-contained page: curves, scores before and after, rows, tokens and weights."""
