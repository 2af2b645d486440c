"""The process, its machine and its files: everything below the model that knows the operating
system.
"""
