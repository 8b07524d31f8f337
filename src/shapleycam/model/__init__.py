"""The user's model: its layers, their layouts, and running it with the target layers captured."""
