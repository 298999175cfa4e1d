"""What a model needs, what the machine has, and what goes where. Nothing is loaded."""
