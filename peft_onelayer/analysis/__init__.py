"""What training changed: sparsity, rank and norm of the change, tensor by tensor, and what runs have in common."""
