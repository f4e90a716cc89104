"""Random bad input: cases, what makes them, and what became of each."""
