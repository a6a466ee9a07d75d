"""A model that names the main colour of a picture; its weights are written by hand."""
