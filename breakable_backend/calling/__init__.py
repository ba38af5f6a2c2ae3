"""What happens in each call of a compiled graph."""
