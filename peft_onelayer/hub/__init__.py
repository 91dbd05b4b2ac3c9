"""Adapters on the Hugging Face Hub: publish, fetch, find, describe. Endpoint and token are huggingface_hub's own."""
