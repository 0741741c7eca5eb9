"""What happens to a sample between its bytes and the tensors that a backbone takes."""
