"""Public weights of the rivals: names, shapes and settings, in and out."""
