"""The adapter as files."""
