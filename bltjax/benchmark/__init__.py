"""Every figure of the documentation, by command: ours beside a named alternative."""
