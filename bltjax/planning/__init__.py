"""Programs compiled for TPUs that are not here: do they fit, how fast can they be."""
