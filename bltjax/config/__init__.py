"""Settings as frozen dataclasses, config files, and the options that commands share."""
