"""Quantized weights: what their bytes mean, format by format, and how one expert is decoded."""
