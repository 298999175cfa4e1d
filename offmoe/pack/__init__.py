"""Writes a checkpoint with quantized experts: once (`offmoe pack`), or into a temporary folder while a model loads."""
