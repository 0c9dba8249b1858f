"""`compare`: methods side by side on one text."""
