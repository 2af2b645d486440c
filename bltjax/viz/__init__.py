"""Pictures and pages: how texts are cut, and how a run went."""
