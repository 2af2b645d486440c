"""Released weights in other people's layouts, read and written."""
