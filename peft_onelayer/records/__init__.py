"""What is written beside an adapter, as types, and the one way to read and write files."""
