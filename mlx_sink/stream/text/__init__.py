"""From text to tokens and back: encoding, chat templates, detokenising, stop strings."""
