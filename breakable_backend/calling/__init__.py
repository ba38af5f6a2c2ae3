"""What happens when a compiled function is called."""
