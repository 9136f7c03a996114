"""Random graphs over several ranks, what the pipeline makes of them, and mutations of what it made."""
