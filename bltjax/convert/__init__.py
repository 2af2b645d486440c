"""Released weights in, ours out; and whether what lies in a folder is whole."""
