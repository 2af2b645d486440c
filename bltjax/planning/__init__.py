"""Programs compiled for absent TPUs: whether they fit, and bounds on their speed."""
