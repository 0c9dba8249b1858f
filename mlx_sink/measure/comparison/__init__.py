"""Methods to keep a stream's context, side by side on one text: run, results, state file."""
