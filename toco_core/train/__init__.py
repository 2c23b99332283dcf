"""The training loop, its estimates, its start over several processes, its failures."""
