"""The process, its machine and its files: all that knows the operating system."""
