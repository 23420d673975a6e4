"""What models do with specs."""
