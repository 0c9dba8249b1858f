"""Tokens and text in and out, for ever; save and resume."""
