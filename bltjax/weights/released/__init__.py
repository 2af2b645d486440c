"""Released weights in third-party layouts, read and written."""
