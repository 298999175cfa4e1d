"""What a model needs, what the machine has, what goes where, and how fast it would be. Nothing is loaded."""
