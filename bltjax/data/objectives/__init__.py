"""Examples for models that see both sides: masked spans, prefixes, masked characters."""
