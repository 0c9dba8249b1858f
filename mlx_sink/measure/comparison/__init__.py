"""Methods side by side on one text: losses, bytes, times, and questions."""
