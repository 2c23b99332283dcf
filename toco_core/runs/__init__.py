"""Runs on disk, runs side by side, and the published ones."""
