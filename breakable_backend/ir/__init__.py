"""What a graph is before anything runs: the program, what its ops read and write, and which tensors share memory."""
