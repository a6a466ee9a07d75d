"""Ops on the compiled kernels; the modules beside this package have the same ops in torch alone."""
