"""Pictures of patches, and the HTML page of a run."""
