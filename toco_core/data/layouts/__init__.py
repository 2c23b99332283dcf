"""The layouts in which data sets lie on disk."""
