"""Has a name that cannot be called."""
