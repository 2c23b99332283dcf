"""The machine that the method runs on: its files and what they may ask of it."""
