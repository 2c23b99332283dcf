"""What `toco` runs that is not a room's own: the notebooks that come with the package."""
