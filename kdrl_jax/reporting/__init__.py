"""The page about runs: what is read of them, which panels there are, and how they look."""
