"""What lies in a model folder: is it whole, and what does its configuration say."""
