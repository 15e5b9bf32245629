"""Runs a model on a GPU: own kernels for decode, library products for prefill."""
