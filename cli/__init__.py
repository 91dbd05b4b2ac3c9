"""The command `onelayer`."""
