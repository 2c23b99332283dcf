"""Scores: metrics, a whole split, evaluations that resume, and the protocols that compare."""
