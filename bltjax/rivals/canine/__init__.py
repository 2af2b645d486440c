"""CANINE: an encoder of characters by molecules, and a head for masked ones."""
