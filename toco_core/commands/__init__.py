"""The one command line, a module per command."""
