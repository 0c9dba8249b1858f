"""Command lines: one line of text from a person to the packages below, and back."""
