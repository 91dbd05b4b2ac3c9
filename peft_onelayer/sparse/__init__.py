"""The sparse encoding of an adapter: what SPECIFICATION.md says, as functions on tensors and JSON."""
