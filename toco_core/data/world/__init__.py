"""What the embedded world is made of: shapes, species and paint."""
