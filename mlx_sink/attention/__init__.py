"""One call of attention: which keys at which distance, and what multiplies them."""
