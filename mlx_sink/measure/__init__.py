"""What a model costs and what it keeps, estimated or measured."""
