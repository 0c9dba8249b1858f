"""`generate`: read a text of any length, stream text for ever."""
