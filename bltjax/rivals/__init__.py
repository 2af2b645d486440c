"""The rivals of BLT: MegaByte, SpaceByte, MambaByte, ByT5, CANINE and a BPE Llama."""
