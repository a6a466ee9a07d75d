"""A model's files: where they are, what they say, how their tensors get into the model."""
